// The problem of frame attention in plain structs, and the table of kernels of an instruction set.
//
// Query i sees the keys kv_start[i] <= j < kv_end[i]. Neither limit ever falls from one row to the next. The kernels
// need that: they take the keys that a tile of rows sees from its first and last row.
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
  Heads o;                           // written by forward, read by backward
  float* lse;                        // [q_heads, queries], natural logarithm; written by forward, read by backward

  // Backward alone uses the rest.
  ConstHeads grad_o;
  const float* grad_lse;  // [q_heads, queries] or null
  float* delta;           // [q_heads, queries]: sum(grad_o * o) - grad_lse
  float* dq_sums;         // [q_heads, query tiles, head_dim, query_tile]
  // [kv_heads, key tiles], 0 at the start: the number of query tiles to whose dq_sums this key tile has added.
  std::atomic<int64_t>* done;
  Heads dq, dk, dv;
};

/// The kernels of one instruction set. `scratch` is 64-byte aligned and holds as many floats as forward_scratch or
/// backward_scratch says. An item of backward waits for the item of the key tile before it, so items must be started in
/// ascending order of their key tile.
struct FrameAttentionKernels {
  int64_t query_tile, key_tile;  // tokens of the tiles of backward; fixed, and with them the order of every sum
  int64_t (*forward_tile)(int64_t group);
  /// A thread calls begin before its items and end after them: they set and release the state of the instructions.
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
/// These three compute bf16 only. The first is for CPUs that also have AVX512_BF16, the second for those that have
/// AMX-BF16 as well, and the third has the tiles of AMX in software.
extern const FrameAttentionKernels kFrameAttentionAvx512Bf16;
extern const FrameAttentionKernels kFrameAttentionAmx;
extern const FrameAttentionKernels kFrameAttentionAmxModel;

}  // namespace lumos
