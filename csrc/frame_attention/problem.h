// Frame attention on the CPU. Query i sees the keys kv_start[i] <= j < kv_end[i].
//
// The limits may come in any order: what a tile sees is bounded by the lowest kv_start and the highest kv_end of its own
// queries. 0 <= kv_start[i] <= kv_end[i] <= keys holds for every query. The kernels need it to stay inside k and v, and
// op.cpp makes it so.
#pragma once

#include <atomic>
#include <cstdint>

#include "simd/views.h"

namespace lumos {

/// The keys that some queries see. Queries without keys do not count for the first two numbers. They do for the others,
/// so that their pairs are always masked.
struct Visible {
  int64_t first, end;              // no query sees a key outside [first, end); first >= end if there are no keys
  int64_t whole_first, whole_end;  // every query sees every key of [whole_first, whole_end)
};

struct FrameAttentionProblem {
  Dtype dtype;
  int64_t queries, keys, q_heads, kv_heads, head_dim;  // head_dim is a multiple of 32
  float scale;
  int64_t tile;  // query tokens of an item of the forward pass, forward_tile(q_heads / kv_heads)
  ConstHeads q, k, v;
  const int32_t *kv_start, *kv_end;  // [queries]
  Heads o;                           // forward: written; backward: read
  float* lse;                        // [q_heads, queries], natural logarithm; written or read as o

  // Only backward uses the rest.
  ConstHeads grad_o;
  const float* grad_lse;  // [q_heads, queries] or null
  float* delta;           // [q_heads, queries]: sum(grad_o * o) - grad_lse
  float* dq_sums;         // [q_heads, query tiles, head_dim, query_tile]
  Visible* visible;       // [query tiles]
  /// [kv_heads, key tiles], 0 at the start: how many query tiles have dq_sums that hold this key tile (see backward.h).
  std::atomic<int64_t>* done;
  Heads dq, dk, dv;
};

/// The kernels of one instruction set. `scratch` is 64-byte aligned and holds as many floats as forward_scratch or
/// backward_scratch returns. An item of backward waits for the item of the key tile before, so items must start in
/// order.
struct FrameAttentionKernels {
  int64_t query_tile, key_tile;  // tokens of the tiles of backward; constants, so the order of every sum is fixed
  int64_t (*forward_tile)(int64_t group);
  /// A thread calls begin before its calls of forward or backward and end after them. They set up and release the state
  /// of the instructions.
  void (*begin)();
  void (*end)();
  int64_t (*forward_scratch)(const FrameAttentionProblem& problem);
  int64_t (*backward_scratch)(const FrameAttentionProblem& problem);
  void (*forward)(const FrameAttentionProblem& problem, int64_t kv_head, int64_t first_token, float* scratch);
  /// Fills delta and visible and clears dq_sums for one query tile.
  void (*prepare)(const FrameAttentionProblem& problem, int64_t query_tile);
  /// Writes dk and dv of one key tile and adds to dq_sums.
  void (*backward)(const FrameAttentionProblem& problem, int64_t kv_head, int64_t key_tile, float* scratch);
  /// Writes dq of one query tile.
  void (*finish)(const FrameAttentionProblem& problem, int64_t query_tile, float* scratch);
};

extern const FrameAttentionKernels kFrameAttentionBase;
extern const FrameAttentionKernels kFrameAttentionAvx2;
extern const FrameAttentionKernels kFrameAttentionAvx512;
/// The next three take bf16 only. They are for CPUs with AVX512_BF16, for CPUs with AMX-BF16 as well, and for AMX-BF16
/// modelled in software.
extern const FrameAttentionKernels kFrameAttentionAvx512Bf16;
extern const FrameAttentionKernels kFrameAttentionAmx;
extern const FrameAttentionKernels kFrameAttentionAmxModel;

}  // namespace lumos
