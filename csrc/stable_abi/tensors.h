// Helpers of the op.cpp files, which register the ops under torch's stable ABI. One library serves every Python and
// every torch from TORCH_TARGET_VERSION on. Only this folder and the op.cpp files include torch's headers.
//
// An op.cpp file turns tensors into the plain structs of a problem.h and hands out the threads. The kernels know
// neither torch nor threads. Callers (lumos_kernels/*/native.py) have validated shapes, dtypes and devices.
//
// An op takes its instruction set as an int: torch's stable ABI leaks a std::string for every string argument (seen in
// 2.13).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd/isa.h"
#include "simd/views.h"

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

/// Returns the kernels that an instruction set runs, for an op that has three versions of them.
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

/// Return views of a tensor [T, H, D] with a unit last stride.
inline ConstHeads read_heads(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
inline Heads write_heads(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1)}; }

/// A buffer of floats for one thread, aligned to a cache line. The size is rounded up, because std::aligned_alloc wants
/// a multiple of the alignment.
struct Scratch {
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), std::free) {
    STD_TORCH_CHECK(data, "out of memory for a scratch buffer of ", floats, " floats");
  }
  std::unique_ptr<float, decltype(&std::free)> data;
};

}  // namespace lumos
