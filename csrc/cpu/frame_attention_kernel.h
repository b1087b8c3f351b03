// Frame attention written once over simd_*.h, simd_math.h and frame_attention_matmul.h; each frame_attention_<isa>.cpp
// includes the vocabulary of its instruction set, then this.
//
// Forward owns a tile of query tokens with all query heads of a kv head and walks over the keys they see: scores of six
// rows at a time, online softmax in base 2, sums in fp32. Backward owns a tile of keys and walks over the queries that
// see it, in the orientation keys x queries: there lse and delta belong to lanes, and the transposed p and ds are left
// operands as they come. With p = 2^(s - lse), dp = do v^T and ds = p * (dp - delta):
//     dv += p^T do,   dk += scale ds^T q,   dq += scale ds k.
// The first two stay with the owner. dq is summed transposed in fp32 memory, one key tile after the other (`done`).
#pragma once

#include <math.h>
#include <sched.h>

#include <cstdint>
#include <type_traits>

#include "frame_attention_matmul.h"
#include "lumos/frame_attention.h"

namespace lumos {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = __builtin_inff();
constexpr float kTiny = __FLT_MIN__;  // makes a scale of 0 keep what is masked at -infinity
constexpr int64_t kColumns = 32;  // columns of a matmul come in multiples of this

// No functions of the standard library here: the linker would merge them with other files' copies (see views.h).
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Hands out aligned pieces of the scratch; from address 0 it measures how much that is.
class Pieces {
 public:
  explicit Pieces(float* scratch) : scratch_(scratch) {}
  float* take(int64_t floats) {
    float* piece = scratch_ ? scratch_ + taken_ : nullptr;
    taken_ += round_up(floats, 16);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  float* scratch_;
  int64_t taken_ = 0;
};

// ---- forward ----

/// Keys in a block: its K and V, 32 KB in bf16, stay near L1 while all rows of the tile pass.
inline int64_t key_block(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }

template <class M>
struct ForwardSpace {
  float *q, *sums, *parts, *best, *rows, *k, *v, *scores, *p;
  int64_t size;

  ForwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t queries = x.q_heads / x.kv_heads * x.tile, keys = key_block(x.head_dim);
    Pieces pieces(scratch);
    q = pieces.take(queries * x.head_dim / M::kStep);
    sums = pieces.take(queries * x.head_dim);  // of p v
    parts = pieces.take(queries * kLanes);     // of p, by lane
    best = pieces.take(queries);               // largest score so far, before the scale
    rows = pieces.take(keys * x.head_dim / M::kStep);
    k = pieces.take(keys * x.head_dim / M::kStep);
    v = pieces.take(keys * x.head_dim / M::kStep);
    scores = pieces.take(kBlockRows * keys);
    p = pieces.take(kBlockRows * keys / M::kStep);
    size = pieces.taken();
  }
};

template <class T, class M>
class Forward {
 public:
  Forward(const FrameAttentionProblem& problem, int64_t kv_head, int64_t first_token, float* scratch)
      : x_(problem),
        space_(problem, scratch),
        kv_head_(kv_head),
        group_(problem.q_heads / problem.kv_heads),
        first_(first_token),
        count_(smaller(problem.tile, problem.queries - first_token)),
        padded_(round_up(count_, kBlockRows)),
        words_(problem.head_dim / M::kStep),
        factor_(static_cast<float>(::fabs(problem.scale) * kLog2E) + kTiny) {}

  void run() {
    start();
    const int64_t end = x_.kv_end[first_ + count_ - 1], width = key_block(x_.head_dim);
    for (int64_t key = x_.kv_start[first_]; key < end; key += width) {
      pack_keys(key, smaller(width, end - key));
      for (int64_t row = 0; row < group_ * padded_; row += kBlockRows) add_keys(row, key);
    }
    finish();
  }

 private:
  /// Query token of a row; padding repeats the last token.
  int64_t token(int64_t row) const { return first_ + smaller(row % padded_, count_ - 1); }

  void start() {
    for (int64_t g = 0; g < group_; ++g) {
      const Source<T> source(x_.q, kv_head_ * group_ + g, first_, count_, x_.head_dim, x_.kv_start, x_.kv_end);
      pack_rows<M>(source, padded_, space_.q + g * padded_ * words_);
    }
    if (x_.scale < 0) negate(space_.q, group_ * padded_ * words_);
    fill(space_.sums, group_ * padded_ * x_.head_dim, 0.0f);
    fill(space_.parts, group_ * padded_ * kLanes, 0.0f);
    fill(space_.best, group_ * padded_, -kInfinity);
  }

  /// The online maximum wants a positive scale.
  static void negate(float* words, int64_t count) {
    constexpr uint32_t kSigns = M::kStep == 2 ? 0x80008000 : 0x80000000;
    for (int64_t i = 0; i < count; ++i) words[i] = float_of(bits_of(words[i]) ^ kSigns);
  }

  void pack_keys(int64_t key, int64_t count) {
    columns_ = round_up(count, kColumns);
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key, count, x_.head_dim, x_.q_start, x_.q_end);
    };
    pack_rows<M>(source(x_.k), columns_, space_.rows);
    transpose(space_.rows, words_, columns_, words_, space_.k, columns_);
    pack_rows<M>(source(x_.v), columns_, space_.rows);
    pairs_of_rows<M>(space_.rows, columns_, x_.head_dim, space_.v);
  }

  void add_keys(int64_t row, int64_t key) {
    const int64_t first = token(row), last = token(row + kBlockRows - 1);
    if (x_.kv_end[last] <= key || x_.kv_start[first] >= key + columns_) return;
    matmul<M, Start::zero>(space_.q + row * words_, words_, space_.k, columns_, kBlockRows, columns_, words_,
                           space_.scores, columns_);
    const bool all = x_.kv_start[last] <= key && x_.kv_end[first] >= key + columns_;
    alignas(64) float factors[16];
    if (!all) mask(row, key);
    soften(row, factors);
    matmul<M, Start::scaled>(space_.p, columns_ / M::kStep, space_.v, x_.head_dim, kBlockRows, x_.head_dim,
                             columns_ / M::kStep, space_.sums + row * x_.head_dim, x_.head_dim, factors);
  }

  void mask(int64_t row, int64_t key) {
    const Vec nothing = broadcast(-kInfinity), numbers = lane_numbers();
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const Vec low = broadcast(from_origin(x_.kv_start[token(row + i)], key));
      const Vec high = broadcast(from_origin(x_.kv_end[token(row + i)], key));
      float* scores = space_.scores + i * columns_;
      for (int64_t j = 0; j < columns_; j += kLanes) {
        const Vec index = numbers + broadcast(static_cast<float>(j));
        store(scores + j, select_between(low, index, high, load(scores + j), nothing));
      }
    }
  }

  /// A limit as a distance that a float holds exactly.
  float from_origin(int64_t limit, int64_t key) const {
    return static_cast<float>(smaller(larger(limit - key, 0), columns_));
  }

  /// Scores to probabilities against the new maximum; factors: what the rows' earlier sums are worth against it.
  void soften(int64_t row, float* factors) {
    float* best = space_.best + row;
    alignas(64) float next[16] = {}, change[16] = {};
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const float* scores = space_.scores + i * columns_;
      Vec largest = load(scores);
      for (int64_t j = kLanes; j < columns_; j += kLanes) largest = maximum(largest, load(scores + j));
      const float top = max_lane(largest), found = top > best[i] ? top : best[i];
      next[i] = found == -kInfinity ? 0.0f : found;
      change[i] = (best[i] - next[i]) * factor_;
      best[i] = found;
    }
    for (int64_t i = 0; i < 8; i += kLanes) store(factors + i, exp2<6>(load(change + i)));
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const float* scores = space_.scores + i * columns_;
      float* p = space_.p + i * columns_ / M::kStep;
      const Vec factor = broadcast(factor_), shift = broadcast(next[i]);
      float* parts = space_.parts + (row + i) * kLanes;
      Vec first_sum = load(parts) * broadcast(factors[i]), second_sum = broadcast(0.0f);
      for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
        const Vec first = exp2<M::kForwardDegree>((load(scores + j) - shift) * factor);
        const Vec second = exp2<M::kForwardDegree>((load(scores + j + kLanes) - shift) * factor);
        first_sum = first_sum + first;
        second_sum = second_sum + second;
        M::store_along(p + j / M::kStep, first, second);
      }
      store(parts, first_sum + second_sum);
    }
  }

  void finish() {
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t t = 0; t < count_; ++t) {
        const int64_t row = g * padded_ + t;
        float sum = 0;
        for (int64_t i = 0; i < kLanes; ++i) sum += space_.parts[row * kLanes + i];
        const bool empty = x_.kv_start[first_ + t] >= x_.kv_end[first_ + t];
        const double lse = space_.best[row] * ::fabs(x_.scale) + ::log(static_cast<double>(sum));
        x_.lse[head * x_.queries + first_ + t] = empty ? -kInfinity : static_cast<float>(lse);
        T* o = static_cast<T*>(x_.o.data) + (first_ + t) * x_.o.token_stride + head * x_.o.head_stride;
        const float* sums = space_.sums + row * x_.head_dim;
        const Vec inverse = broadcast(empty ? 0.0f : 1.0f / sum);
        for (int64_t d = 0; d < x_.head_dim; d += kLanes) store(o + d, load(sums + d) * inverse);
      }
    }
  }

  const FrameAttentionProblem& x_;
  ForwardSpace<M> space_;
  int64_t kv_head_, group_, first_, count_, padded_, words_, columns_ = 0;
  float factor_;  // of the scores, base 2
};

// ---- backward ----

constexpr int64_t kQueryTile = kAttentionQueryTile, kKeyTile = kAttentionKeyTile;
static_assert(kKeyTile % (2 * kBlockRows) == 0 && kKeyTile % kColumns == 0 && kQueryTile % kColumns == 0);

inline int64_t tiles(int64_t tokens, int64_t tile) { return (tokens + tile - 1) / tile; }

inline float* dq_sums(const FrameAttentionProblem& x, int64_t head, int64_t tile) {
  return x.dq_sums + (head * tiles(x.queries, kQueryTile) + tile) * x.head_dim * kQueryTile;
}

template <class... Pointers>
inline void take(Pieces& pieces, int64_t floats, Pointers&... pointers) {
  ((pointers = pieces.take(floats)), ...);
}

template <class M>
struct BackwardSpace {
  float *k, *v, *k_turned, *dk, *dv, *rows, *q_columns, *q_pairs, *do_columns, *do_pairs;
  float *scores, *dp, *p, *ds, *ds_pairs, *lse, *delta, *start, *end;
  int64_t size;

  BackwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t keys = kKeyTile * x.head_dim, queries = kQueryTile * x.head_dim, pairs = kKeyTile * kQueryTile;
    Pieces pieces(scratch);
    take(pieces, keys / M::kStep, k, v, k_turned);
    take(pieces, keys, dk, dv);
    rows = pieces.take(larger(keys, queries) / M::kStep);
    take(pieces, queries / M::kStep, q_columns, q_pairs, do_columns, do_pairs);
    take(pieces, kBlockRows * kQueryTile, scores, dp);
    take(pieces, pairs / M::kStep, p, ds);
    ds_pairs = M::kStep == 1 ? ds : pieces.take(pairs / M::kStep);
    take(pieces, kQueryTile, lse, delta, start, end);
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
        key_(key_tile * kKeyTile),
        keys_(smaller(kKeyTile, problem.keys - key_)),
        words_(problem.head_dim / M::kStep),
        done_(problem.done + kv_head * tiles(problem.keys, kKeyTile) + key_tile) {}

  void run() {
    pack_keys();
    const int64_t first = x_.q_start[key_], end = x_.q_end[key_ + keys_ - 1];
    const int64_t end_tile = first < end ? tiles(end, kQueryTile) : 0;
    for (int64_t tile = first / kQueryTile; tile < end_tile; ++tile) {
      if (turn_to(tile)) {
        for (int64_t g = 0; g < group_; ++g) add_queries(kv_head_ * group_ + g, tile);
      }
      wait_for(tile + 1);
      done_->store(tile + 1, std::memory_order_release);
    }
    wait_for(tiles(x_.queries, kQueryTile));
    done_->store(tiles(x_.queries, kQueryTile), std::memory_order_release);
    write(x_.dk, space_.dk, x_.scale);
    write(x_.dv, space_.dv, 1.0f);
  }

 private:
  void pack_keys() {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key_, keys_, x_.head_dim, x_.q_start, x_.q_end);
    };
    pack_rows<M>(source(x_.k), kKeyTile, space_.k);
    pack_rows<M>(source(x_.v), kKeyTile, space_.v);
    pairs_of_rows<M>(space_.k, kKeyTile, x_.head_dim, space_.rows);
    transpose(space_.rows, x_.head_dim, kKeyTile / M::kStep, x_.head_dim, space_.k_turned, kKeyTile / M::kStep);
    fill(space_.dk, kKeyTile * x_.head_dim, 0.0f);
    fill(space_.dv, kKeyTile * x_.head_dim, 0.0f);
  }

  /// Waits until dq_sums of the query tiles before `end_tile` hold the key tile before this one.
  void wait_for(int64_t end_tile) const {
    if (key_tile_ == 0) return;
    while ((done_ - 1)->load(std::memory_order_acquire) < end_tile) sched_yield();
  }

  /// Limits of a query tile, for all heads. Returns whether any of its queries sees a key of this tile.
  bool turn_to(int64_t tile) {
    query_ = tile * kQueryTile;
    queries_ = smaller(kQueryTile, x_.queries - query_);
    columns_ = round_up(queries_, kColumns);
    const int64_t last = query_ + queries_ - 1;
    low_ = larger(0, x_.kv_start[query_] - key_) / (2 * kBlockRows) * (2 * kBlockRows);
    high_ = round_up(smaller(keys_, x_.kv_end[last] - key_), 2 * kBlockRows);
    open_low_ = x_.kv_start[last] - key_;  // keys from here on and below open_high_ are seen by every query
    open_high_ = queries_ == columns_ ? x_.kv_end[query_] - key_ : 0;
    for (int64_t i = 0; i < columns_; ++i) {
      const bool inside = i < queries_;
      space_.start[i] = inside ? from_origin(x_.kv_start[query_ + i]) : 0;
      space_.end[i] = inside ? from_origin(x_.kv_end[query_ + i]) : 0;
    }
    return low_ < high_;
  }

  float from_origin(int64_t limit) const { return static_cast<float>(smaller(larger(limit - key_, 0), kKeyTile)); }

  void pack_queries(int64_t head) {
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, head, query_, queries_, x_.head_dim, x_.kv_start, x_.kv_end);
    };
    pack_rows<M>(source(x_.q), columns_, space_.rows);
    transpose(space_.rows, words_, columns_, words_, space_.q_columns, columns_);
    pairs_of_rows<M>(space_.rows, columns_, x_.head_dim, space_.q_pairs);
    pack_rows<M>(source(x_.grad_o), columns_, space_.rows);
    transpose(space_.rows, words_, columns_, words_, space_.do_columns, columns_);
    pairs_of_rows<M>(space_.rows, columns_, x_.head_dim, space_.do_pairs);
    const float* lse = x_.lse + head * x_.queries + query_;
    const float* delta = x_.delta + head * x_.queries + query_;
    for (int64_t i = 0; i < columns_; ++i) {
      space_.lse[i] = i < queries_ ? lse[i] : 0;
      space_.delta[i] = i < queries_ ? delta[i] : 0;
    }
  }

  void add_queries(int64_t head, int64_t tile) {
    pack_queries(head);
    for (int64_t key = low_; key < high_; key += kBlockRows) add_scores(key);
    const int64_t keys = high_ - low_, stride = columns_ / M::kStep, dim = x_.head_dim;
    const float* p = space_.p + low_ * stride;
    const float* ds = space_.ds + low_ * stride;
    matmul<M, Start::sum>(p, stride, space_.do_pairs, dim, keys, dim, stride, space_.dv + low_ * dim, dim);
    matmul<M, Start::sum>(ds, stride, space_.q_pairs, dim, keys, dim, stride, space_.dk + low_ * dim, dim);
    wait_for(tile + 1);
    matmul<M, Start::sum>(space_.k_turned + low_ / M::kStep, kKeyTile / M::kStep,
                          space_.ds_pairs + low_ / M::kStep * columns_, columns_, dim, columns_, keys / M::kStep,
                          dq_sums(x_, head, tile), kQueryTile);
  }

  /// p and ds of six keys and all queries of the tile.
  void add_scores(int64_t key) {
    matmul<M, Start::zero>(space_.k + key * words_, words_, space_.q_columns, columns_, kBlockRows, columns_, words_,
                           space_.scores, columns_);
    matmul<M, Start::zero>(space_.v + key * words_, words_, space_.do_columns, columns_, kBlockRows, columns_, words_,
                           space_.dp, columns_);
    if (key >= open_low_ && key + kBlockRows <= open_high_) {
      soften<false>(key);
    } else {
      soften<true>(key);
    }
  }

  template <bool kMasked>
  void soften(int64_t key) {
    const Vec scale = broadcast(x_.scale), log2e = broadcast(static_cast<float>(kLog2E)), zero = broadcast(0.0f);
    for (int64_t i = 0; i < kBlockRows; i += 2) {
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
            // Never above 0 but for rounding, which large scores make large.
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
  int64_t query_ = 0, queries_ = 0, columns_ = 0;              // of the query tile
  int64_t low_ = 0, high_ = 0, open_low_ = 0, open_high_ = 0;  // keys of this tile that it sees
};

template <class T>
void prepare(const FrameAttentionProblem& x, int64_t tile) {
  const int64_t first = tile * kQueryTile, end = smaller(x.queries, first + kQueryTile);
  for (int64_t head = 0; head < x.q_heads; ++head) {
    fill(dq_sums(x, head, tile), x.head_dim * kQueryTile, 0.0f);
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

template <class T>
void finish(const FrameAttentionProblem& x, int64_t tile, float* scratch) {
  const int64_t first = tile * kQueryTile, end = smaller(x.queries, first + kQueryTile);
  const Vec scale = broadcast(x.scale);
  for (int64_t head = 0; head < x.q_heads; ++head) {
    transpose(dq_sums(x, head, tile), kQueryTile, x.head_dim, kQueryTile, scratch, x.head_dim);
    for (int64_t t = first; t < end; ++t) {
      T* dq = static_cast<T*>(x.dq.data) + t * x.dq.token_stride + head * x.dq.head_stride;
      const float* sums = scratch + (t - first) * x.head_dim;
      for (int64_t d = 0; d < x.head_dim; d += kLanes) store(dq + d, load(sums + d) * scale);
    }
  }
}

// ---- the table ----

template <class M>
int64_t forward_scratch(const FrameAttentionProblem& x) {
  return ForwardSpace<M>(x, nullptr).size;
}

template <class M>
int64_t backward_scratch(const FrameAttentionProblem& x) {
  return larger(BackwardSpace<M>(x, nullptr).size, kQueryTile * x.head_dim);
}

template <class T, class M>
void forward_tile(const FrameAttentionProblem& x, int64_t kv_head, int64_t first_token, float* scratch) {
  Forward<T, M>(x, kv_head, first_token, scratch).run();
}

template <class T, class M>
void backward_tile(const FrameAttentionProblem& x, int64_t kv_head, int64_t key_tile, float* scratch) {
  Backward<T, M>(x, kv_head, key_tile, scratch).run();
}

/// Calls body with a null pointer of the storage type.
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

[[maybe_unused]] void forward_any(const FrameAttentionProblem& x, int64_t kv_head, int64_t first_token, float* scratch) {
  with_storage(x.dtype, [&](auto* storage) {
    forward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, first_token, scratch);
  });
}

[[maybe_unused]] void prepare_any(const FrameAttentionProblem& x, int64_t query_tile) {
  with_storage(x.dtype, [&](auto* storage) { prepare<std::remove_pointer_t<decltype(storage)>>(x, query_tile); });
}

[[maybe_unused]] void backward_any(const FrameAttentionProblem& x, int64_t kv_head, int64_t key_tile, float* scratch) {
  with_storage(x.dtype, [&](auto* storage) {
    backward_tile<std::remove_pointer_t<decltype(storage)>, Fp32>(x, kv_head, key_tile, scratch);
  });
}

[[maybe_unused]] void finish_any(const FrameAttentionProblem& x, int64_t query_tile, float* scratch) {
  with_storage(x.dtype,
               [&](auto* storage) { finish<std::remove_pointer_t<decltype(storage)>>(x, query_tile, scratch); });
}

}  // namespace
}  // namespace lumos
