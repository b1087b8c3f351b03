// The table of frame attention's kernels for one instruction set. Each <isa>.cpp of this folder includes the vectors of
// its instruction set (simd/base.h, avx2.h or avx512.h), then this, and defines its table.
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

/// Calls body with a null pointer to the storage type of `dtype`.
template <class Body>
inline void with_storage_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bf16:
      return body(static_cast<BFloat16*>(nullptr));
    case Dtype::fp16:
      return body(static_cast<Half*>(nullptr));
    case Dtype::fp32:
      return body(static_cast<float*>(nullptr));
  }
}

[[maybe_unused]] void forward_in_fp32(const FrameAttentionProblem& x, int64_t kv_head, int64_t first_token,
                                      float* scratch) {
  with_storage_type(x.dtype, [&](auto* storage) {
    forward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, first_token, scratch);
  });
}

[[maybe_unused]] void prepare_in_fp32(const FrameAttentionProblem& x, int64_t query_tile) {
  with_storage_type(x.dtype,
                    [&](auto* storage) { prepare<std::remove_pointer_t<decltype(storage)>, Fp32>(x, query_tile); });
}

[[maybe_unused]] void backward_in_fp32(const FrameAttentionProblem& x, int64_t kv_head, int64_t key_tile,
                                       float* scratch) {
  with_storage_type(x.dtype, [&](auto* storage) {
    backward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, key_tile, scratch);
  });
}

[[maybe_unused]] void finish_in_fp32(const FrameAttentionProblem& x, int64_t query_tile, float* scratch) {
  with_storage_type(x.dtype, [&](auto* storage) {
    finish<std::remove_pointer_t<decltype(storage)>, Fp32>(x, query_tile, scratch);
  });
}

/// The kernels for bf16, fp16 and fp32 storage, all computed in fp32.
[[maybe_unused]] constexpr FrameAttentionKernels kFp32Kernels = {
    Fp32::kQueryTile,       Fp32::kKeyTile,  Fp32::forward_tile, Fp32::begin,      Fp32::end,     forward_scratch<Fp32>,
    backward_scratch<Fp32>, forward_in_fp32, prepare_in_fp32,    backward_in_fp32, finish_in_fp32};

/// The kernels for bf16 storage, with matmuls of bf16 words.
template <class M>
constexpr FrameAttentionKernels kBf16Kernels = {M::kQueryTile,
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
