// The instruction sets that CPU kernels are compiled for and the test whether this CPU runs them.
#pragma once

namespace lumos {

/// The sets from the weakest to the strongest. Python passes the value to an op. An op that has no code for a set runs
/// the next weaker one. amx_model is amx with tile registers modelled in software. It is slow, for tests, and never
/// chosen by default.
enum class Isa : int { base, avx2, avx512, avx512_bf16, amx, amx_model };

struct IsaInfo {
  Isa isa;
  const char* name;
  bool (*supported)();
};

/// All sets, the strongest first and amx_model last.
inline constexpr int kIsaCount = 6;
extern const IsaInfo kIsas[kIsaCount];

}  // namespace lumos
