#include "simd/isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cpuid.h>

namespace lumos {
namespace {

// __builtin_cpu_supports also tests whether the operating system saves the registers.
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool runs_base() { return true; }

/// Returns whether the CPU has AMX-BF16 and AMX-TILE and the operating system saves the tile registers. Compilers older
/// than AMX do not know the names, so this reads CPUID leaf 7 and the bits of XCR0 for the configuration (17) and the
/// data (18) of tiles.
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // runs_amx tests AVX-512 first, which implies xgetbv
  return (low >> 17 & 3) == 3;
}

/// Asks Linux for permission to use tiles, which it gives to all threads of the process.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_amx() {
  static const bool runs = runs_avx512_bf16() && has_tiles() && may_use_tiles();
  return runs;
}

}  // namespace

const IsaInfo kIsas[kIsaCount] = {
    {Isa::amx, "amx", runs_amx},
    {Isa::avx512_bf16, "avx512_bf16", runs_avx512_bf16},
    {Isa::avx512, "avx512", runs_avx512},
    {Isa::avx2, "avx2", runs_avx2},
    {Isa::base, "base", runs_base},
    {Isa::amx_model, "amx_model", runs_avx512_bf16},
};

}  // namespace lumos
