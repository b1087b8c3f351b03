// Instruction sets that CPU kernels are compiled for, and which of them this CPU runs.
#pragma once

namespace lumos {

/// Ordered from the weakest to the strongest; the value is what Python hands to an op.
enum class Isa : int { base, avx2, avx512 };

struct IsaInfo {
  Isa isa;
  const char* name;
  bool (*supported)();
};

/// All of them, best first.
inline constexpr int kIsaCount = 3;
extern const IsaInfo kIsas[kIsaCount];

}  // namespace lumos
