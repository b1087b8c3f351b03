// The table of frame attention's kernels. base.cpp, avx2.cpp, avx512.cpp and their siblings include the vectors of
// their instruction set (simd/<isa>.h), then this file, and define their table from kAnyInFp32 or kBf16In.
//
// forward.h and backward.h hold the algorithms. M is the way to compute: Vectors<...> of matmul.h or OnTiles<...> of
// tiles.h. T is the storage type of q, k and v.
#pragma once

#include <type_traits>

#include "frame_attention/backward.h"
#include "frame_attention/forward.h"

namespace lumos {
namespace {

template <class M>
int64_t forward_scratch(const FrameAttentionProblem& x) {
  return ForwardSpace<M>(x, nullptr).size;
}

template <class M>
int64_t backward_scratch(const FrameAttentionProblem& x) {
  return larger(BackwardSpace<M>(x, nullptr).size, M::kQueryTile * x.head_dim);
}

template <class T, class M>
void forward_tile(const FrameAttentionProblem& x, int64_t kv_head, int64_t first_token, float* scratch) {
  Forward<T, M>(x, kv_head, first_token, scratch).run();
}

template <class T, class M>
void backward_tile(const FrameAttentionProblem& x, int64_t kv_head, int64_t key_tile, float* scratch) {
  Backward<T, M>(x, kv_head, key_tile, scratch).run();
}

/// Calls body with a null pointer to the storage type: a type as an argument.
template <class Body>
inline void with_storage(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bf16:
      return body(static_cast<BFloat16*>(nullptr));
    case Dtype::fp16:
      return body(static_cast<Half*>(nullptr));
    case Dtype::fp32:
      return body(static_cast<float*>(nullptr));
  }
}

[[maybe_unused]] void forward_any(const FrameAttentionProblem& x, int64_t kv_head, int64_t first_token,
                                  float* scratch) {
  with_storage(x.dtype, [&](auto* storage) {
    forward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, first_token, scratch);
  });
}

[[maybe_unused]] void prepare_any(const FrameAttentionProblem& x, int64_t query_tile) {
  with_storage(x.dtype, [&](auto* storage) { prepare<std::remove_pointer_t<decltype(storage)>, Fp32>(x, query_tile); });
}

[[maybe_unused]] void backward_any(const FrameAttentionProblem& x, int64_t kv_head, int64_t key_tile, float* scratch) {
  with_storage(x.dtype, [&](auto* storage) {
    backward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, key_tile, scratch);
  });
}

[[maybe_unused]] void finish_any(const FrameAttentionProblem& x, int64_t query_tile, float* scratch) {
  with_storage(x.dtype,
               [&](auto* storage) { finish<std::remove_pointer_t<decltype(storage)>, Fp32>(x, query_tile, scratch); });
}

/// Kernels for bf16, fp16 and fp32 storage that compute in fp32.
[[maybe_unused]] constexpr FrameAttentionKernels kAnyInFp32 = {
    Fp32::kQueryTile,       Fp32::kKeyTile, Fp32::forward_tile, Fp32::begin,  Fp32::end, forward_scratch<Fp32>,
    backward_scratch<Fp32>, forward_any,    prepare_any,        backward_any, finish_any};

/// Kernels for bf16 storage that compute in words of two bf16.
template <class M>
constexpr FrameAttentionKernels kBf16In = {M::kQueryTile,
                                           M::kKeyTile,
                                           M::forward_tile,
                                           M::begin,
                                           M::end,
                                           forward_scratch<M>,
                                           backward_scratch<M>,
                                           forward_tile<BFloat16, M>,
                                           prepare<BFloat16, M>,
                                           backward_tile<BFloat16, M>,
                                           finish<BFloat16, M>};

}  // namespace
}  // namespace lumos
