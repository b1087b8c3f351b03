// The backward pass of frame attention. With s = q k^T and lse from the forward pass,
//     p = 2^((s scale - lse) log2(e)),   dp = do v^T,   delta = rowsum(do * o) - dlse,   ds = p * (dp - delta),
//     dv = p^T do,   dk = scale ds^T q,   dq = scale ds k.
//
// An item is a kv head and a tile of keys, and walks over the tiles of queries that see it. Everything is computed
// transposed, keys x queries: lse and delta then belong to lanes, and p and ds are left operands as they come. dk and
// dv stay with the item, summed over the query heads that share the kv head. dq is summed in fp32 memory, transposed.
//
// The order of the sums of dq. Every key tile adds to dq_sums of a query tile only after the key tile before it has
// done so: the item waits for the counter `done` of that key tile and then raises its own (run). So each sum has one
// order, and the result is the same whatever the number of threads. Items start in ascending order of their key tile
// (each_item in op.cpp), so the item that is waited for has always started and the wait cannot deadlock.
#pragma once

#include "frame_attention/shared.h"

namespace lumos {
namespace {

inline int64_t tiles(int64_t tokens, int64_t tile) { return (tokens + tile - 1) / tile; }

template <class M>
inline float* dq_sums(const FrameAttentionProblem& x, int64_t head, int64_t tile) {
  return x.dq_sums + (head * tiles(x.queries, M::kQueryTile) + tile) * x.head_dim * M::kQueryTile;
}

template <class... Pointers>
inline void take(Pieces& pieces, int64_t floats, Pointers&... pointers) {
  ((pointers = pieces.take(floats)), ...);
}

/// The scratch memory of an item.
template <class M>
struct BackwardSpace {
  float *k, *v, *k_turned, *dk, *dv, *rows, *q_columns, *q_pairs, *do_columns, *do_pairs;
  float *scores, *dp, *p, *ds, *ds_pairs, *lse, *delta, *start, *end;
  int64_t size;

  BackwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t keys = M::kKeyTile * x.head_dim, queries = M::kQueryTile * x.head_dim;
    const int64_t pairs = M::kKeyTile * M::kQueryTile;
    Pieces pieces(scratch);
    take(pieces, keys / M::kStep, k, v, k_turned);
    take(pieces, keys, dk, dv);
    rows = pieces.take(kColumns * x.head_dim / M::kStep);
    take(pieces, queries / M::kStep, q_columns, q_pairs, do_columns, do_pairs);
    take(pieces, M::kKeyStep * M::kQueryTile, scores, dp);
    take(pieces, pairs / M::kStep, p, ds);
    ds_pairs = M::kStep == 1 ? ds : pieces.take(pairs / M::kStep);
    take(pieces, M::kQueryTile, lse, delta, start, end);
    size = pieces.taken();
  }
};

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
        words_(problem.head_dim / M::kStep),
        done_(problem.done + kv_head * tiles(problem.keys, M::kKeyTile) + key_tile) {}

  void run() {
    pack_keys();
    const int64_t first = x_.q_start[key_], end = x_.q_end[key_ + keys_ - 1];
    const int64_t end_tile = first < end ? tiles(end, M::kQueryTile) : 0;
    for (int64_t tile = first / M::kQueryTile; tile < end_tile; ++tile) {
      if (read_limits(tile)) {
        for (int64_t g = 0; g < group_; ++g) add_queries(kv_head_ * group_ + g, tile);
      }
      wait_for(tile + 1);
      done_->store(tile + 1, std::memory_order_release);
    }
    wait_for(tiles(x_.queries, M::kQueryTile));
    done_->store(tiles(x_.queries, M::kQueryTile), std::memory_order_release);
    write(x_.dk, space_.dk, x_.scale);
    write(x_.dv, space_.dv, 1.0f);
  }

 private:
  /// Packs k and v as left operands, and k transposed for dq.
  void pack_keys() {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key_, keys_, x_.head_dim, x_.q_start, x_.q_end);
    };
    pack_rows<M>(source(x_.k), 0, M::kKeyTile, space_.k);
    pack_rows<M>(source(x_.v), 0, M::kKeyTile, space_.v);
    for (int64_t i = 0; i < M::kKeyTile; i += kColumns) {
      constexpr int64_t kPairs = kColumns / M::kStep;
      pairs_of_rows<M>(space_.k + i * words_, kColumns, x_.head_dim, space_.rows);
      transpose(space_.rows, x_.head_dim, kPairs, x_.head_dim, space_.k_turned + i / M::kStep, M::kKeyTile / M::kStep);
    }
    fill(space_.dk, M::kKeyTile * x_.head_dim, 0.0f);
    fill(space_.dv, M::kKeyTile * x_.head_dim, 0.0f);
  }

  /// Waits until the key tile before this one has added to dq_sums of all query tiles before `end_tile`.
  void wait_for(int64_t end_tile) const {
    if (key_tile_ == 0) return;
    while ((done_ - 1)->load(std::memory_order_acquire) < end_tile) sched_yield();
  }

  /// Reads the limits of a query tile, which all heads share. Returns whether one of its queries sees a key of this
  /// tile.
  bool read_limits(int64_t tile) {
    query_ = tile * M::kQueryTile;
    queries_ = smaller(M::kQueryTile, x_.queries - query_);
    columns_ = round_up(queries_, kColumns);
    const int64_t last = query_ + queries_ - 1;
    low_ = larger(0, x_.kv_start[query_] - key_) / M::kKeyStep * M::kKeyStep;
    high_ = round_up(smaller(keys_, x_.kv_end[last] - key_), M::kKeyStep);
    open_low_ = x_.kv_start[last] - key_;  // every query sees the keys in [open_low_, open_high_)
    open_high_ = queries_ == columns_ ? x_.kv_end[query_] - key_ : 0;
    for (int64_t i = 0; i < columns_; ++i) {
      const bool inside = i < queries_;
      space_.start[i] = inside ? from_origin(x_.kv_start[query_ + i]) : 0;
      space_.end[i] = inside ? from_origin(x_.kv_end[query_ + i]) : 0;
    }
    return low_ < high_;
  }

  float from_origin(int64_t limit) const { return static_cast<float>(smaller(larger(limit - key_, 0), M::kKeyTile)); }

  /// Packs q and do of a head in both forms, and copies lse and delta.
  void pack_queries(int64_t head) {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, head, query_, queries_, x_.head_dim, x_.kv_start, x_.kv_end);
    };
    pack<M>(source(x_.q), columns_, space_.rows, space_.q_columns, space_.q_pairs);
    pack<M>(source(x_.grad_o), columns_, space_.rows, space_.do_columns, space_.do_pairs);
    const float* lse = x_.lse + head * x_.queries + query_;
    const float* delta = x_.delta + head * x_.queries + query_;
    for (int64_t i = 0; i < columns_; ++i) {
      space_.lse[i] = i < queries_ ? lse[i] : 0;
      space_.delta[i] = i < queries_ ? delta[i] : 0;
    }
  }

  /// Adds what the queries of a head and tile contribute to dv, dk and dq.
  void add_queries(int64_t head, int64_t tile) {
    pack_queries(head);
    for (int64_t key = low_; key < high_; key += M::kKeyStep) {
      fetch_ahead(head, tile, key);
      add_scores(key);
    }
    const int64_t keys = high_ - low_, stride = columns_ / M::kStep, dim = x_.head_dim;
    const float* p = space_.p + low_ * stride;
    const float* ds = space_.ds + low_ * stride;
    M::template matmul<Start::sum>(p, stride, space_.do_pairs, dim, keys, dim, stride, space_.dv + low_ * dim, dim);
    M::template matmul<Start::sum>(ds, stride, space_.q_pairs, dim, keys, dim, stride, space_.dk + low_ * dim, dim);
    wait_for(tile + 1);
    M::template matmul<Start::sum>(space_.k_turned + low_ / M::kStep, M::kKeyTile / M::kStep,
                                   space_.ds_pairs + low_ / M::kStep * columns_, columns_, dim, columns_,
                                   keys / M::kStep, dq_sums<M>(x_, head, tile), M::kQueryTile);
  }

  /// Prefetches what is read next, a share with each step of the keys: dq_sums, and the queries of the next head or
  /// tile.
  /// Without this, waiting took 5 %.
  [[gnu::always_inline]] inline void fetch_ahead(int64_t head, int64_t tile, int64_t key) const {
    const auto share = [&](int64_t all, int64_t end) { return all * (end - low_) / (high_ - low_); };
    const bool last = head + 1 == (kv_head_ + 1) * group_;
    const int64_t next = last ? kv_head_ * group_ : head + 1, first = last ? query_ + M::kQueryTile : query_;
    const int64_t rows = smaller(M::kQueryTile, x_.queries - first), end = key + M::kKeyStep;
    for (int64_t i = share(rows, key); i < share(rows, end); ++i) {
      fetch_row<2, T>(x_.q, first + i, next, x_.head_dim);
      fetch_row<2, T>(x_.grad_o, first + i, next, x_.head_dim);
    }
    const int64_t sums = M::kQueryTile * x_.head_dim;
    fetch<2>(dq_sums<M>(x_, head, tile) + share(sums, key), share(sums, end) - share(sums, key));
  }

  /// Makes p and ds of kKeyStep keys and all queries of the tile.
  void add_scores(int64_t key) {
    M::template matmul<Start::zero>(space_.k + key * words_, words_, space_.q_columns, columns_, M::kKeyStep, columns_,
                                    words_, space_.scores, columns_);
    M::template matmul<Start::zero>(space_.v + key * words_, words_, space_.do_columns, columns_, M::kKeyStep, columns_,
                                    words_, space_.dp, columns_);
    if (key >= open_low_ && key + M::kKeyStep <= open_high_) {
      store_p_and_ds<false>(key);
    } else {
      store_p_and_ds<true>(key);
    }
  }

  /// Turns scores and dp into p and ds, packed as operands of the matmuls that follow.
  template <bool kMasked>
  void store_p_and_ds(int64_t key) {
    const Vec scale = broadcast(x_.scale), log2e = broadcast(static_cast<float>(kLog2E)), zero = broadcast(0.0f);
    for (int64_t i = 0; i < M::kKeyStep; i += 2) {
      float* p_to = space_.p + (key + i) * columns_ / M::kStep;
      float* ds_to = space_.ds + (key + i) * columns_ / M::kStep;
      float* pairs_to = space_.ds_pairs + (key + i) / 2 * columns_;
      for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
        Vec p[2][2], ds[2][2];
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
#pragma GCC unroll 2
          for (int b = 0; b < 2; ++b) {
            const int64_t lane = j + b * kLanes, at = (i + a) * columns_ + lane;
            // The exponent exceeds 0 by rounding alone, which grows with the scores.
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
          M::store_along(p_to + (a * columns_ + j) / M::kStep, p[a][0], p[a][1]);
          M::store_along(ds_to + (a * columns_ + j) / M::kStep, ds[a][0], ds[a][1]);
        }
        if constexpr (M::kStep == 2) {
          store(pairs_to + j, M::across(ds[0][0], ds[1][0]));
          store(pairs_to + j + kLanes, M::across(ds[0][1], ds[1][1]));
        }
      }
    }
  }

  /// Writes dk or dv from its sums.
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
  int64_t kv_head_, group_, key_tile_, key_, keys_, words_;
  std::atomic<int64_t>* done_;
  int64_t query_ = 0, queries_ = 0, columns_ = 0;  // first query, number of queries, the same padded: of the query tile
  int64_t low_ = 0, high_ = 0, open_low_ = 0, open_high_ = 0;  // keys of this tile that the query tile sees
};

/// Fills delta and clears dq_sums for one query tile.
template <class T, class M>
void prepare(const FrameAttentionProblem& x, int64_t tile) {
  const int64_t first = tile * M::kQueryTile, end = smaller(x.queries, first + M::kQueryTile);
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

/// Writes dq of one query tile from dq_sums.
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
