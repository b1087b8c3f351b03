// Instruction sets that CPU kernels are compiled for, and which of them this CPU runs.
#pragma once

namespace lumos {

/// Ordered from the weakest to the strongest; the value is what Python hands to an op. An op without code for one of
/// them runs the next weaker. amx_model is amx with its tiles in software: slow, for tests, never chosen by itself.
enum class Isa : int { base, avx2, avx512, avx512_bf16, amx, amx_model };

struct IsaInfo {
  Isa isa;
  const char* name;
  bool (*supported)();
};

/// All of them, best first, the model last.
inline constexpr int kIsaCount = 6;
extern const IsaInfo kIsas[kIsaCount];

}  // namespace lumos
