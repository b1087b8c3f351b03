// Descriptions of tensors that every kernel uses. Strides count elements and are int64. The last stride is 1.
//
// These types have no member functions. Files compiled for different instruction sets include this header, and the
// linker would keep one copy of an inline function for all of them, possibly one that this CPU cannot run.
#pragma once

#include <cstdint>

namespace lumos {

enum class Dtype : int { bf16, fp16, fp32 };

/// A tensor [T, H, D] to read.
struct ConstHeads {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

/// A tensor [T, H, D] to write.
struct Heads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

}  // namespace lumos
