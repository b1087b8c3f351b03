// Helpers of the op.cpp files, which register the ops under torch's stable ABI. One library serves every Python and
// every torch from TORCH_TARGET_VERSION on. Only this folder and the op.cpp files include torch's headers.
//
// An op.cpp file turns tensors into the plain structs of a problem.h and hands out the threads. The kernels know
// neither torch nor threads. An op checks the shape, dtype and strides of what it gets (check_tensor): whatever a
// caller of torch.ops passes, no kernel leaves its tensors.
//
// An op takes its instruction set as an int: torch's stable ABI leaks a std::string for every string argument (seen in
// 2.13).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>

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

/// How a kernel walks over a tensor. A last dimension of one element counts as one with a unit stride.
enum class Strides { any, unit_last, contiguous };

/// Raises an error unless x has these sizes, this dtype and such strides.
inline void check_tensor(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype,
                         Strides strides = Strides::contiguous) {
  const int64_t dims = x.dim();
  bool fits = dims == static_cast<int64_t>(sizes.size()) && x.scalar_type() == dtype;
  for (int64_t i = 0; fits && i < dims; ++i) fits = x.size(i) == sizes.begin()[i];
  if (fits && strides != Strides::any && x.numel()) {
    fits = strides == Strides::contiguous ? x.is_contiguous() : x.size(dims - 1) == 1 || x.stride(dims - 1) == 1;
  }
  if (fits) return;
  std::string wanted, got;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t i = 0; i < dims; ++i) got += (i ? ", " : "") + std::to_string(x.size(i));
  constexpr const char* kStrides[] = {"", ", with a unit last stride", ", contiguous"};
  STD_TORCH_CHECK(false, name, " must be [", wanted, "] of the dtype that the op takes",
                  kStrides[static_cast<int>(strides)], "; got [", got, "]",
                  x.is_contiguous() ? "" : ", not contiguous", ", ",
                  x.scalar_type() == dtype ? "of that dtype" : "of another dtype");
}

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
