// The forward pass of frame attention: an item is a kv head and a tile of query tokens, with all query heads of it.
//
// Softmax in base 2: p = 2^(s factor - reference), o = sum p v / sum p. The reference of a row is its largest exponent
// so far; when it rises, what was summed is scaled down.
//
// Under M::kFixedReference it is 0 as long as |s factor| <= |q| |k| factor is at most kFixedLimit (Cauchy and Schwarz;
// the scores' own rounding is 1e-4 of that at most): no pass for the maximum, nothing to scale. p lies between 2^-31
// and 2^31 then, which fp32 and bf16 hold with all their bits, and while |v| is below 2^60 a sum of 2^36 terms does
// not overflow. The norms are the largest of a row block and of a key block; a row block turns to the maximum at the
// first key block that is too large, or not finite. The maximum is rounded to an integer there: what a row does not
// see does count in the norms, but which reference it leads to changes p by a power of 2 and no bit of the result.
// (The exception: terms that fp32 may lose under one reference and hold under the other, those of values |v| < 2^-64 or
// of weights below 2^-60.)
// Elsewhere the exponent is (s - maximum) factor, so that the row of one key has p = 1 and its o is v exactly, in fp32
// too.
#pragma once

#include "frame_attention/shared.h"

namespace lumos {
namespace {

constexpr float kFixedLimit = 30.0f;
constexpr float kLargestValue = 0x1p60f;

template <class M>
struct ForwardSpace {
  float *q, *sums, *parts, *rounded, *best, *norms, *rows, *k, *v, *scores, *p;
  int64_t size;

  ForwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t queries = x.q_heads / x.kv_heads * x.tile, keys = M::key_block(x.head_dim);
    Pieces pieces(scratch);
    q = pieces.take(queries * x.head_dim / M::kStep);
    sums = pieces.take(queries * x.head_dim);  // of p v
    parts = pieces.take(queries * kLanes);     // of p, by lane
    rounded = M::kStep == 1 ? parts : pieces.take(queries * kLanes);  // of p as the matmul sees it
    best = pieces.take(queries);               // the reference: an exponent if it may be fixed, else a score
    norms = pieces.take(queries / M::kRows);   // largest |q| of a row block, infinity once it follows the maximum
    rows = pieces.take(kColumns * x.head_dim / M::kStep);
    k = pieces.take(keys * x.head_dim / M::kStep);
    v = pieces.take(keys * x.head_dim / M::kStep);
    scores = pieces.take(M::kRows * keys);
    p = pieces.take(M::kRows * keys / M::kStep);
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
        padded_(round_up(count_, M::kRows)),
        words_(problem.head_dim / M::kStep),
        factor_(static_cast<float>(::fabs(problem.scale) * kLog2E) + kTiny) {}

  void run() {
    start();
    const int64_t end = x_.kv_end[first_ + count_ - 1], width = M::key_block(x_.head_dim);
    for (int64_t key = x_.kv_start[first_]; key < end; key += width) {
      pack_keys(key, smaller(width, end - key));
      const int64_t rows = group_ * padded_, next = key + width, ahead = smaller(width, end - next);
      for (int64_t row = 0; row < rows; row += M::kRows) {
        // The keys of the next block, a few at a time: waiting for them took 1 to 3 %.
        for (int64_t i = ahead * row / rows; i < ahead * (row + M::kRows) / rows; ++i) {
          fetch_row<3, T>(x_.k, next + i, kv_head_, x_.head_dim);
          fetch_row<3, T>(x_.v, next + i, kv_head_, x_.head_dim);
        }
        add_keys(row, key);
      }
    }
    finish();
  }

 private:
  static constexpr int64_t kPaddedRows = (M::kRows + 15) / 16 * 16;

  /// Query token of a row; padding repeats the last token.
  int64_t token(int64_t row) const { return first_ + smaller(row % padded_, count_ - 1); }

  void start() {
    for (int64_t g = 0; g < group_; ++g) {
      const Source<T> source(x_.q, kv_head_ * group_ + g, first_, count_, x_.head_dim, x_.kv_start, x_.kv_end);
      pack_rows<M>(source, 0, padded_, space_.q + g * padded_ * words_);
    }
    if (x_.scale < 0) negate(space_.q, group_ * padded_ * words_);
    fill(space_.sums, group_ * padded_ * x_.head_dim, 0.0f);
    fill(space_.parts, group_ * padded_ * kLanes, 0.0f);
    fill(space_.rounded, group_ * padded_ * kLanes, 0.0f);
    fill(space_.best, group_ * padded_, M::kFixedReference ? 0.0f : -kInfinity);
    if constexpr (M::kFixedReference) {
      for (int64_t row = 0; row < group_ * padded_; row += M::kRows) {
        const float norm = norm_of(largest_row_square<M>(space_.q + row * words_, M::kRows, words_));
        space_.norms[row / M::kRows] = norm;
        if (norm == kInfinity) follow_maximum(row);
      }
    }
  }

  /// The online maximum wants a positive scale.
  static void negate(float* words, int64_t count) {
    constexpr uint32_t kSigns = M::kStep == 2 ? 0x80008000 : 0x80000000;
    for (int64_t i = 0; i < count; ++i) words[i] = float_of(bits_of(words[i]) ^ kSigns);
  }

  /// From a sum of squares, to which dots add no products below kTiny.
  float norm_of(float square) const { return __builtin_sqrtf(square + x_.head_dim * kTiny); }

  void pack_keys(int64_t key, int64_t count) {
    columns_ = round_up(count, kColumns);
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key, count, x_.head_dim, x_.q_start, x_.q_end);
    };
    pack<M>(source(x_.k), columns_, space_.rows, space_.k, nullptr);
    pack<M>(source(x_.v), columns_, space_.rows, nullptr, space_.v);
    if constexpr (M::kFixedReference) {
      // Of v, the norm of a channel over the block bounds its elements.
      key_norm_ = norm_of(largest_square<M>(space_.k, words_, columns_));
      const float value = largest_square<M>(space_.v, columns_ / M::kStep, x_.head_dim);
      if (!(value <= kLargestValue * kLargestValue)) key_norm_ = kInfinity;
    }
  }

  void add_keys(int64_t row, int64_t key) {
    const int64_t first = token(row), last = token(row + M::kRows - 1);
    if (x_.kv_end[last] <= key || x_.kv_start[first] >= key + columns_) return;
    M::template matmul<Start::zero>(space_.q + row * words_, words_, space_.k, columns_, M::kRows, columns_, words_,
                                    space_.scores, columns_);
    const bool all = x_.kv_start[last] <= key && x_.kv_end[first] >= key + columns_;
    if (!all) mask(row, key);
    if constexpr (M::kFixedReference) {
      float& norm = space_.norms[row / M::kRows];
      if (norm * key_norm_ * factor_ <= kFixedLimit) {  // false for NaN, which infinity times 0 is, too
        for (int64_t i = 0; i < M::kRows; ++i) weigh<false>(row, i, 0.0f, 1.0f);
        add_values<Start::sum>(row, nullptr);
        return;
      }
      if (norm != kInfinity) follow_maximum(row);
      norm = kInfinity;
    }
    alignas(64) float factors[kPaddedRows];
    soften(row, factors);
    add_values<Start::scaled>(row, factors);
  }

  template <Start kStart>
  void add_values(int64_t row, const float* factors) {
    M::template matmul<kStart>(space_.p, columns_ / M::kStep, space_.v, x_.head_dim, M::kRows, x_.head_dim,
                               columns_ / M::kStep, space_.sums + row * x_.head_dim, x_.head_dim, factors);
  }

  /// From the reference 0 on: it is what the sums are worth, unless the row has seen no key yet.
  void follow_maximum(int64_t row) {
    for (int64_t i = row; i < row + M::kRows; ++i) space_.best[i] = sum_of(space_.parts, i) > 0 ? 0.0f : -kInfinity;
  }

  static float sum_of(const float* parts, int64_t row) {
    float sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += parts[row * kLanes + i];
    return sum;
  }

  void mask(int64_t row, int64_t key) {
    const Vec nothing = broadcast(-kInfinity), numbers = lane_numbers();
    for (int64_t i = 0; i < M::kRows; ++i) {
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
    alignas(64) float top[kPaddedRows] = {}, change[kPaddedRows] = {};
    for (int64_t i = 0; i < M::kRows; ++i) {
      const float* scores = space_.scores + i * columns_;
      Vec largest = load(scores);
      for (int64_t j = kLanes; j < columns_; j += kLanes) largest = maximum(largest, load(scores + j));
      top[i] = max_lane(largest);
    }
    if constexpr (M::kFixedReference) {
      for (int64_t i = 0; i < kPaddedRows; i += kLanes) {
        store(top + i, round_to_integer(load(top + i) * broadcast(factor_)));
      }
    }
    for (int64_t i = 0; i < M::kRows; ++i) {
      const float found = top[i] > best[i] ? top[i] : best[i];
      top[i] = found == -kInfinity ? 0.0f : found;
      change[i] = (best[i] - top[i]) * (M::kFixedReference ? 1.0f : factor_);
      best[i] = found;
    }
    for (int64_t i = 0; i < kPaddedRows; i += kLanes) store(factors + i, exp2<6>(load(change + i)));
    for (int64_t i = 0; i < M::kRows; ++i) weigh<true>(row, i, top[i], factors[i]);
  }

  template <bool kLarge>
  static Vec weight(Vec score, Vec factor, Vec reference) {
    if constexpr (M::kFixedReference) return exp2_product<M::kForwardDegree, kLarge>(score, factor, reference);
    return exp2<M::kForwardDegree>((score - reference) * factor);
  }

  /// Row i of the scores to probabilities against a reference; what their sums hold is worth `worth` of itself now.
  template <bool kLarge>
  void weigh(int64_t row, int64_t i, float reference, float worth) {
    const float* scores = space_.scores + i * columns_;
    float* p = space_.p + i * columns_ / M::kStep;
    const Vec factor = broadcast(factor_), shift = broadcast(reference);
    float *parts = space_.parts + (row + i) * kLanes, *rounded = space_.rounded + (row + i) * kLanes;
    Vec first_sum = load(parts) * broadcast(worth), second_sum = broadcast(0.0f);
    Vec rounded_sum = load(rounded) * broadcast(worth);
    for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
      const Vec first = weight<kLarge>(load(scores + j), factor, shift);
      const Vec second = weight<kLarge>(load(scores + j + kLanes), factor, shift);
      first_sum = first_sum + first;
      second_sum = second_sum + second;
      M::store_along(p + j / M::kStep, first, second);
      if constexpr (M::kStep == 2) rounded_sum = M::dot(rounded_sum, M::ones(), load(p + j / 2));
    }
    if constexpr (M::kStep == 2) store(rounded, rounded_sum);
    store(parts, first_sum + second_sum);
  }

  void finish() {
    const double unit = M::kFixedReference ? 1 / kLog2E : ::fabs(x_.scale);  // of the reference
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t t = 0; t < count_; ++t) {
        const int64_t row = g * padded_ + t;
        const float sum = sum_of(space_.parts, row);
        const bool empty = x_.kv_start[first_ + t] >= x_.kv_end[first_ + t];
        const double lse = space_.best[row] * unit + ::log(static_cast<double>(sum));
        x_.lse[head * x_.queries + first_ + t] = empty ? -kInfinity : static_cast<float>(lse);
        T* o = static_cast<T*>(x_.o.data) + (first_ + t) * x_.o.token_stride + head * x_.o.head_stride;
        const float* sums = space_.sums + row * x_.head_dim;
        const Vec inverse = broadcast(empty ? 0.0f : 1.0f / sum_of(space_.rounded, row));
        for (int64_t d = 0; d < x_.head_dim; d += kLanes) store(o + d, load(sums + d) * inverse);
      }
    }
  }

  const FrameAttentionProblem& x_;
  ForwardSpace<M> space_;
  int64_t kv_head_, group_, first_, count_, padded_, words_, columns_ = 0;
  float factor_;  // of the scores, base 2
  float key_norm_ = 0;  // largest |k| of the block, infinity where v is too large for the reference 0
};


}  // namespace
}  // namespace lumos
