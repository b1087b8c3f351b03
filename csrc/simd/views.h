// Plain descriptions of tensors, shared by every kernel. Strides count elements and are int64; the last one is 1.
//
// The structs hold data only and have no member functions. Files compiled for different instruction sets include this,
// and the linker keeps one copy of an inline function for all of them, possibly one that this CPU cannot run.
#pragma once

#include <cstdint>

namespace lumos {

enum class Dtype : int { bf16, fp16, fp32 };

/// A tensor [T, H, D] that is read.
struct ConstHeads {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

/// A tensor [T, H, D] that is written.
struct Heads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

}  // namespace lumos
