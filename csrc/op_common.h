// What the files that register ops share: how torch's dtypes and instruction sets become ours.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "lumos/isa.h"
#include "lumos/views.h"

namespace lumos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Float:
      return Dtype::fp32;
    default:
      STD_TORCH_CHECK(false, "the compiled library computes bfloat16, float16 and float32");
  }
}

/// Of an op whose code is compiled three times: the one that the instruction set runs.
template <class Kernels>
const Kernels& kernels_for(int64_t isa, const Kernels& avx512, const Kernels& avx2, const Kernels& base) {
  switch (static_cast<Isa>(isa)) {
    case Isa::amx_model:
    case Isa::amx:
    case Isa::avx512_bf16:
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::base:
      return base;
  }
  STD_TORCH_CHECK(false, "no instruction set ", isa);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lumos
