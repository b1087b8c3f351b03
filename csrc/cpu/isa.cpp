#include "lumos/isa.h"

namespace lumos {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool runs_base() { return true; }

}  // namespace

const IsaInfo kIsas[kIsaCount] = {
    {Isa::avx512, "avx512", runs_avx512},
    {Isa::avx2, "avx2", runs_avx2},
    {Isa::base, "base", runs_base},
};

}  // namespace lumos
