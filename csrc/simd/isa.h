// The instruction sets that CPU kernels are compiled for, and the test of whether this CPU runs them.
#pragma once

namespace lumos {

/// The instruction sets from the weakest to the strongest. Python hands their values to the ops. An op without code for
/// one of them runs the next weaker one. amx_model is amx with its tiles in software: it is slow, is there for tests,
/// and is never chosen by itself.
enum class Isa : int { base, avx2, avx512, avx512_bf16, amx, amx_model };

struct IsaInfo {
  Isa isa;
  const char* name;
  bool (*supported)();
};

/// All instruction sets, best first, the model last.
inline constexpr int kIsaCount = 6;
extern const IsaInfo kIsas[kIsaCount];

}  // namespace lumos
