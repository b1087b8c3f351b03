// Frame attention on the CPU: query i sees the keys kv_start[i] <= j < kv_end[i]; both limits are non-decreasing.
#pragma once

#include <atomic>
#include <cstdint>

#include "simd/views.h"

namespace lumos {

struct FrameAttentionProblem {
  Dtype dtype;
  int64_t queries, keys, q_heads, kv_heads, head_dim;  // head_dim is a multiple of 32
  float scale;
  int64_t tile;  // query tokens of an item of the forward pass: forward_tile(q_heads / kv_heads)
  ConstHeads q, k, v;
  const int32_t *kv_start, *kv_end;  // [queries]
  const int32_t *q_start, *q_end;    // [keys]
  Heads o;                           // forward: written; backward: read
  float* lse;                        // [q_heads, queries], natural logarithm; as o

  // The rest is for backward.
  ConstHeads grad_o;
  const float* grad_lse;  // [q_heads, queries] or null
  float* delta;           // [q_heads, queries]: sum(grad_o * o) - grad_lse
  float* dq_sums;         // [q_heads, query tiles, head_dim, query_tile]
  std::atomic<int64_t>* done;  // [kv_heads, key tiles], 0 at the start: query tiles whose dq_sums hold this key tile
  Heads dq, dk, dv;
};

/// The kernels of one instruction set. `scratch` is 64-byte aligned and holds as many floats as the function of the
/// same name says. An item of backward waits for that of the key tile before, so they must be started in order.
struct FrameAttentionKernels {
  int64_t query_tile, key_tile;  // tokens of the tiles of backward; fixed, so that the order of every sum is, too
  int64_t (*forward_tile)(int64_t group);
  /// Around the calls of forward or backward on a thread: they own what state the instructions have.
  void (*begin)();
  void (*end)();
  int64_t (*forward_scratch)(const FrameAttentionProblem& problem);
  int64_t (*backward_scratch)(const FrameAttentionProblem& problem);
  void (*forward)(const FrameAttentionProblem& problem, int64_t kv_head, int64_t first_token, float* scratch);
  /// Fills delta and clears dq_sums for one query tile.
  void (*prepare)(const FrameAttentionProblem& problem, int64_t query_tile);
  /// Writes dk and dv of one key tile and adds to dq_sums.
  void (*backward)(const FrameAttentionProblem& problem, int64_t kv_head, int64_t key_tile, float* scratch);
  /// Writes dq of one query tile.
  void (*finish)(const FrameAttentionProblem& problem, int64_t query_tile, float* scratch);
};

extern const FrameAttentionKernels kFrameAttentionBase;
extern const FrameAttentionKernels kFrameAttentionAvx2;
extern const FrameAttentionKernels kFrameAttentionAvx512;
/// bf16 only: for CPUs that also have AVX512_BF16, those that have AMX-BF16 as well, and the latter in software.
extern const FrameAttentionKernels kFrameAttentionAvx512Bf16;
extern const FrameAttentionKernels kFrameAttentionAmx;
extern const FrameAttentionKernels kFrameAttentionAmxModel;

}  // namespace lumos
