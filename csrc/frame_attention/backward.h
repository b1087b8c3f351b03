// The backward pass of frame attention. For a query i and a key j that it sees, with lse and o of the forward pass and
// do the gradient of o:
//     s_ij    = scale q_i . k_j
//     p_ij    = exp(s_ij - lse_i)
//     dp_ij   = do_i . v_j
//     delta_i = do_i . o_i - grad_lse_i
//     ds_ij   = p_ij (dp_ij - delta_i)
//     dv_j    = sum_i p_ij do_i
//     dk_j    = scale sum_i ds_ij q_i
//     dq_i    = scale sum_j ds_ij k_j
//
// The pass has three steps. prepare() computes delta and clears dq_sums for one query tile. Backward takes one item, a
// kv head and a tile of keys, and walks over the query tiles that see it, with all query heads of the kv head. It owns
// dk and dv of its keys and adds to dq_sums. finish() writes dq of one query tile from dq_sums.
//
// Scores are computed as keys x queries. Then lse and delta belong to lanes, and p^T and ds^T are stored as the left
// operands of the matmuls for dv and dk. dq_sums is transposed, too: [channel][query] for each head and query tile.
//
// Key tiles add to dq_sums in ascending order. A fp32 sum depends on its order, and the result must not depend on which
// thread is faster. `done` of a key tile counts the query tiles, from the first on, whose dq_sums hold this key tile
// and all before it. wait_for() waits for the `done` of the key tile before. add_queries() calls it before its matmul
// into dq_sums, and run() calls it before each store to `done`. Items start in ascending order (each_item in op.cpp),
// so a tile waits only for tiles that have started.
//
// The limits may come in any order. prepare() finds for each query tile the lowest and highest key that its queries see,
// and the keys that all of them see (Visible). run() and set_query_tile() skip keys and queries by these bounds, and
// pairs inside them that do not see each other are masked.
#pragma once

#include "frame_attention/shared.h"

namespace lumos {
namespace {

inline int64_t tile_count(int64_t tokens, int64_t tile) { return (tokens + tile - 1) / tile; }

/// Returns the sums [head_dim][kQueryTile] of a query tile.
template <class M>
inline float* dq_sums(const FrameAttentionProblem& x, int64_t head, int64_t tile) {
  return x.dq_sums + (head * tile_count(x.queries, M::kQueryTile) + tile) * x.head_dim * M::kQueryTile;
}

template <class... Pointers>
inline void take(Arena& arena, int64_t floats, Pointers&... pointers) {
  ((pointers = arena.take(floats)), ...);
}

/// The buffers of an item. In the operands, by_channel, by_token and by_key name the summed dimension:
///     k, v                         A [keys][channels / kStep]
///     q_by_channel, do_by_channel  B [channels / kStep][queries]
///     p, ds                        A [keys][queries / kStep]
///     q_by_token, do_by_token      B [queries / kStep][channels]
///     k_transposed                 A [channels][keys / kStep]
///     ds_by_key                    B [keys / kStep][queries]; with kStep 1 it is ds
template <class M>
struct BackwardSpace {
  float *k, *v, *k_transposed, *dk, *dv, *staging, *q_by_channel, *q_by_token, *do_by_channel, *do_by_token;
  float *scores, *dp, *p, *ds, *ds_by_key, *lse, *delta, *start, *end;
  int32_t* seen_keys;
  int64_t size;

  BackwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t keys = M::kKeyTile * x.head_dim, queries = M::kQueryTile * x.head_dim;
    const int64_t pairs = M::kKeyTile * M::kQueryTile;
    Arena arena(scratch);
    take(arena, keys / M::kStep, k, v, k_transposed);
    take(arena, keys, dk, dv);
    staging = arena.take(kColumns * x.head_dim / M::kStep);
    take(arena, queries / M::kStep, q_by_channel, q_by_token, do_by_channel, do_by_token);
    take(arena, M::kKeyStep * M::kQueryTile, scores, dp);
    take(arena, pairs / M::kStep, p, ds);
    ds_by_key = M::kStep == 1 ? ds : arena.take(pairs / M::kStep);
    take(arena, M::kQueryTile, lse, delta, start, end);
    seen_keys = arena.take<int32_t>(M::kKeyTile + 1);
    size = arena.taken();
  }
};

/// One item of the backward pass.
template <class T, class M>
class Backward {
 public:
  Backward(const FrameAttentionProblem& problem, int64_t kv_head, int64_t key_tile, float* scratch)
      : x_(problem),
        space_(problem, scratch),
        kv_head_(kv_head),
        group_(problem.q_heads / problem.kv_heads),
        key_tile_(key_tile),
        key_(key_tile * M::kKeyTile),
        keys_(smaller(M::kKeyTile, problem.keys - key_)),
        row_words_(problem.head_dim / M::kStep),
        done_(problem.done + kv_head * tile_count(problem.keys, M::kKeyTile) + key_tile) {}

  void run() {
    int64_t first_tile = tile_count(x_.queries, M::kQueryTile), end_tile = 0;
    SeenKeys seen(key_, keys_, space_.seen_keys);
    for (int64_t tile = 0; tile < tile_count(x_.queries, M::kQueryTile); ++tile) {
      if (x_.visible[tile].first >= key_ + keys_ || x_.visible[tile].end <= key_) continue;
      first_tile = smaller(first_tile, tile);
      end_tile = tile + 1;
      seen.add(x_, tile * M::kQueryTile, smaller(M::kQueryTile, x_.queries - tile * M::kQueryTile));
    }
    pack_keys(seen.finish());
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      if (set_query_tile(tile)) {
        for (int64_t g = 0; g < group_; ++g) add_queries(kv_head_ * group_ + g, tile);
      }
      wait_for(tile + 1);
      done_->store(tile + 1, std::memory_order_release);
    }
    wait_for(tile_count(x_.queries, M::kQueryTile));
    done_->store(tile_count(x_.queries, M::kQueryTile), std::memory_order_release);
    write(x_.dk, space_.dk, x_.scale);
    write(x_.dv, space_.dv, 1.0f);
  }

 private:
  void pack_keys(const int32_t* is_seen) {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key_, keys_, x_.head_dim, nullptr, is_seen);
    };
    pack_rows<M>(source(x_.k), 0, M::kKeyTile, space_.k);
    pack_rows<M>(source(x_.v), 0, M::kKeyTile, space_.v);
    for (int64_t i = 0; i < M::kKeyTile; i += kColumns) {
      constexpr int64_t kWordRows = kColumns / M::kStep;
      interleave_rows<M>(space_.k + i * row_words_, kColumns, x_.head_dim, space_.staging);
      transpose(space_.staging, x_.head_dim, kWordRows, x_.head_dim, space_.k_transposed + i / M::kStep,
                M::kKeyTile / M::kStep);
    }
    fill(space_.dk, M::kKeyTile * x_.head_dim, 0.0f);
    fill(space_.dv, M::kKeyTile * x_.head_dim, 0.0f);
  }

  /// Waits until the dq_sums of the query tiles before `end_tile` hold the key tile before this one.
  void wait_for(int64_t end_tile) const {
    if (key_tile_ == 0) return;
    while ((done_ - 1)->load(std::memory_order_acquire) < end_tile) sched_yield();
  }

  /// Sets the limits of a query tile, which all heads share. Returns whether its bounds reach into this tile.
  bool set_query_tile(int64_t tile) {
    query_ = tile * M::kQueryTile;
    queries_ = smaller(M::kQueryTile, x_.queries - query_);
    columns_ = round_up(queries_, kColumns);
    const Visible& seen = x_.visible[tile];
    first_key_ = larger(0, seen.first - key_) / M::kKeyStep * M::kKeyStep;
    end_key_ = round_up(smaller(keys_, seen.end - key_), M::kKeyStep);
    unmasked_first_ = seen.whole_first - key_;
    unmasked_end_ = queries_ == columns_ ? seen.whole_end - key_ : 0;
    for (int64_t i = 0; i < columns_; ++i) {
      const bool inside = i < queries_;
      space_.start[i] = inside ? limit_in_tile(x_.kv_start[query_ + i]) : 0;
      space_.end[i] = inside ? limit_in_tile(x_.kv_end[query_ + i]) : 0;
    }
    return first_key_ < end_key_;
  }

  /// Returns a limit relative to the tile's first key. It is clamped to the tile, so a float holds it exactly.
  float limit_in_tile(int64_t limit) const { return static_cast<float>(smaller(larger(limit - key_, 0), M::kKeyTile)); }

  void pack_queries(int64_t head) {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, head, query_, queries_, x_.head_dim, x_.kv_start + query_, x_.kv_end + query_);
    };
    pack<M>(source(x_.q), columns_, space_.staging, space_.q_by_channel, space_.q_by_token);
    pack<M>(source(x_.grad_o), columns_, space_.staging, space_.do_by_channel, space_.do_by_token);
    const float* lse = x_.lse + head * x_.queries + query_;
    const float* delta = x_.delta + head * x_.queries + query_;
    for (int64_t i = 0; i < columns_; ++i) {
      space_.lse[i] = i < queries_ ? lse[i] : 0;
      space_.delta[i] = i < queries_ ? delta[i] : 0;
    }
  }

  /// Adds a query tile of one head to dk and dv, and this key tile to the dq_sums of that query tile.
  void add_queries(int64_t head, int64_t tile) {
    pack_queries(head);
    for (int64_t key = first_key_; key < end_key_; key += M::kKeyStep) {
      prefetch_next(head, tile, key);
      score_keys(key);
    }
    const int64_t keys = end_key_ - first_key_, stride = columns_ / M::kStep, dim = x_.head_dim;
    const float* p = space_.p + first_key_ * stride;
    const float* ds = space_.ds + first_key_ * stride;
    M::template matmul<Update::add>(p, stride, space_.do_by_token, dim, keys, dim, stride,
                                    space_.dv + first_key_ * dim, dim);
    M::template matmul<Update::add>(ds, stride, space_.q_by_token, dim, keys, dim, stride,
                                    space_.dk + first_key_ * dim, dim);
    wait_for(tile + 1);
    M::template matmul<Update::add>(space_.k_transposed + first_key_ / M::kStep, M::kKeyTile / M::kStep,
                                    space_.ds_by_key + first_key_ / M::kStep * columns_, columns_, dim, columns_,
                                    keys / M::kStep, dq_sums<M>(x_, head, tile), M::kQueryTile);
  }

  /// Prefetches dq_sums of this head, and the queries of the next head or, after the last head, of the next query tile.
  /// Each step of the keys prefetches a share. Waiting for these took 5 % of the time.
  [[gnu::always_inline]] inline void prefetch_next(int64_t head, int64_t tile, int64_t key) const {
    const auto share = [&](int64_t all, int64_t end) { return all * (end - first_key_) / (end_key_ - first_key_); };
    const bool last = head + 1 == (kv_head_ + 1) * group_;
    const int64_t next = last ? kv_head_ * group_ : head + 1, first = last ? query_ + M::kQueryTile : query_;
    const int64_t rows = smaller(M::kQueryTile, x_.queries - first), end = key + M::kKeyStep;
    for (int64_t i = share(rows, key); i < share(rows, end); ++i) {
      prefetch_row<2, T>(x_.q, first + i, next, x_.head_dim);
      prefetch_row<2, T>(x_.grad_o, first + i, next, x_.head_dim);
    }
    const int64_t sums = M::kQueryTile * x_.head_dim;
    prefetch<2>(dq_sums<M>(x_, head, tile) + share(sums, key), share(sums, end) - share(sums, key));
  }

  /// Computes p and ds of kKeyStep keys, from `key` on, and all queries of the tile.
  void score_keys(int64_t key) {
    M::template matmul<Update::assign>(space_.k + key * row_words_, row_words_, space_.q_by_channel, columns_,
                                       M::kKeyStep, columns_, row_words_, space_.scores, columns_);
    M::template matmul<Update::assign>(space_.v + key * row_words_, row_words_, space_.do_by_channel, columns_,
                                       M::kKeyStep, columns_, row_words_, space_.dp, columns_);
    if (key >= unmasked_first_ && key + M::kKeyStep <= unmasked_end_) {
      probabilities_and_ds<false>(key);
    } else {
      probabilities_and_ds<true>(key);
    }
  }

  /// Computes p and ds from scores and dp. kMasked says that some query does not see some of the keys.
  template <bool kMasked>
  void probabilities_and_ds(int64_t key) {
    const Vec scale = broadcast(x_.scale), log2e = broadcast(static_cast<float>(kLog2E)), zero = broadcast(0.0f);
    for (int64_t i = 0; i < M::kKeyStep; i += 2) {
      float* p_to = space_.p + (key + i) * columns_ / M::kStep;
      float* ds_to = space_.ds + (key + i) * columns_ / M::kStep;
      float* by_key_to = space_.ds_by_key + (key + i) / 2 * columns_;
      for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
        Vec p[2][2], ds[2][2];
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
#pragma GCC unroll 2
          for (int b = 0; b < 2; ++b) {
            const int64_t lane = j + b * kLanes, at = (i + a) * columns_ + lane;
            // Only rounding raises the exponent of a key that is seen above 0. It does so by much if scores are large.
            const Vec exponent = minimum(zero, fms(load(space_.scores + at), scale, load(space_.lse + lane)) * log2e);
            p[a][b] = exp2<M::kBackwardDegree>(exponent);
            ds[a][b] = p[a][b] * (load(space_.dp + at) - load(space_.delta + lane));
            if constexpr (kMasked) {
              const Vec index = broadcast(static_cast<float>(key + i + a));
              const Vec from = load(space_.start + lane), until = load(space_.end + lane);
              p[a][b] = select_between(from, index, until, p[a][b], zero);
              ds[a][b] = select_between(from, index, until, ds[a][b], zero);
            }
          }
          M::store_words(p_to + (a * columns_ + j) / M::kStep, p[a][0], p[a][1]);
          M::store_words(ds_to + (a * columns_ + j) / M::kStep, ds[a][0], ds[a][1]);
        }
        if constexpr (M::kStep == 2) {
          store(by_key_to + j, M::interleave(ds[0][0], ds[1][0]));
          store(by_key_to + j + kLanes, M::interleave(ds[0][1], ds[1][1]));
        }
      }
    }
  }

  /// Writes the rows of the tile's keys, `sums` times `scale`.
  void write(const Heads& to, const float* sums, float scale) const {
    for (int64_t i = 0; i < keys_; ++i) {
      T* row = static_cast<T*>(to.data) + (key_ + i) * to.token_stride + kv_head_ * to.head_stride;
      for (int64_t d = 0; d < x_.head_dim; d += kLanes) {
        store(row + d, load(sums + i * x_.head_dim + d) * broadcast(scale));
      }
    }
  }

  const FrameAttentionProblem& x_;
  BackwardSpace<M> space_;
  int64_t kv_head_, group_, key_tile_, key_, keys_, row_words_;
  std::atomic<int64_t>* done_;
  // The query tile: its first query, its queries, and their number padded to kColumns.
  int64_t query_ = 0, queries_ = 0, columns_ = 0;
  // Keys relative to key_. The queries of the tile see no key outside [first_key_, end_key_), which is rounded to
  // kKeyStep. Every query sees every key of [unmasked_first_, unmasked_end_), which is empty if the tile has padding.
  int64_t first_key_ = 0, end_key_ = 0, unmasked_first_ = 0, unmasked_end_ = 0;
};

/// Computes delta and visible, and clears dq_sums, of a query tile.
template <class T, class M>
void prepare(const FrameAttentionProblem& x, int64_t tile) {
  const int64_t first = tile * M::kQueryTile, end = smaller(x.queries, first + M::kQueryTile);
  x.visible[tile] = visible_keys(x, first, end - first);
  for (int64_t head = 0; head < x.q_heads; ++head) {
    fill(dq_sums<M>(x, head, tile), x.head_dim * M::kQueryTile, 0.0f);
    for (int64_t t = first; t < end; ++t) {
      const T* o = static_cast<const T*>(x.o.data) + t * x.o.token_stride + head * x.o.head_stride;
      const T* grad = static_cast<const T*>(x.grad_o.data) + t * x.grad_o.token_stride + head * x.grad_o.head_stride;
      Vec sums = broadcast(0.0f);
      for (int64_t d = 0; d < x.head_dim; d += kLanes) sums = fma(load(o + d), load(grad + d), sums);
      alignas(64) float lanes[kLanes];
      store(lanes, sums);
      float sum = 0;
      for (float lane : lanes) sum += lane;
      const int64_t at = head * x.queries + t;
      x.delta[at] = x.grad_lse ? sum - x.grad_lse[at] : sum;
    }
  }
}

/// Writes dq of a query tile from dq_sums.
template <class T, class M>
void finish(const FrameAttentionProblem& x, int64_t tile, float* scratch) {
  const int64_t first = tile * M::kQueryTile, end = smaller(x.queries, first + M::kQueryTile);
  const Vec scale = broadcast(x.scale);
  for (int64_t head = 0; head < x.q_heads; ++head) {
    transpose(dq_sums<M>(x, head, tile), M::kQueryTile, x.head_dim, M::kQueryTile, scratch, x.head_dim);
    for (int64_t t = first; t < end; ++t) {
      T* dq = static_cast<T*>(x.dq.data) + t * x.dq.token_stride + head * x.dq.head_stride;
      const float* sums = scratch + (t - first) * x.head_dim;
      for (int64_t d = 0; d < x.head_dim; d += kLanes) store(dq + d, load(sums + d) * scale);
    }
  }
}

}  // namespace
}  // namespace lumos
