// The forward pass of frame attention. With c = |scale| log2(e) folded into the scores s, and r an integer or real
// reference of the row,
//     p = 2^(s c - r),   sum = sum of p,   o = (sum of p v) / sum,   lse = r ln 2 + ln(sum).
// Any r gives the same o. It only has to keep p inside the range of fp32.
//
// An item is a kv head and a tile of query tokens, with all query heads that read this kv head. The item walks over
// blocks of keys. A block is packed once, and every row block (M::kRows query rows) of the item uses it.
//
// Online softmax. r is the row's running maximum of s c. When it rises, the sums so far are rescaled by
// 2^(old r - new r). In fp32 the exponent is computed as (s - maximum) c, so that a row with one key has p = 1 and its
// o is v exactly.
//
// Fixed reference (M::kFixedReference). r is 0 as long as norms prove that no exponent is large: by Cauchy and Schwarz
// |s c| <= |q| |k| c, and this product may be at most kFixedLimit. (The rounding of the scores themselves is at most
// 1e-4 of it.) Then no pass for the maximum is needed and nothing is rescaled. p lies between 2^-31 and 2^31, which
// fp32 and bf16 hold with all their bits, and while |v| is below 2^60 a sum of 2^36 terms does not overflow. The norms
// are the largest ones of the row block and of the key block. A row block changes over to the running maximum at the
// first key block whose product of norms is too large, or not finite (add_keys).
//
// The choice between the two must not change the result: the norms count keys that a row does not see, and a row's
// result may not depend on those. So under kFixedReference the running maximum is rounded to an integer
// (softmax_block): another reference then changes p by a power of 2 and no bit of o. The exception are terms that fp32
// loses under one reference and holds under the other: those of values |v| < 2^-64 and of weights below 2^-60.
#pragma once

#include "frame_attention/shared.h"

namespace lumos {
namespace {

constexpr float kFixedLimit = 30.0f;  // of |s c| while the reference is 0
constexpr float kLargestValue = 0x1p60f;

/// The scratch memory of an item.
template <class M>
struct ForwardSpace {
  float *q, *sums, *p_sums, *rounded_p_sums, *references, *norms, *rows, *k, *v, *scores, *p;
  int64_t size;

  ForwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t queries = x.q_heads / x.kv_heads * x.tile, keys = M::key_block(x.head_dim);
    Pieces pieces(scratch);
    q = pieces.take(queries * x.head_dim / M::kStep);
    sums = pieces.take(queries * x.head_dim);  // sums of p v
    p_sums = pieces.take(queries * kLanes);  // sums of p, one a lane
    rounded_p_sums = M::kStep == 1 ? p_sums : pieces.take(queries * kLanes);  // the same of p as rounded for the matmul
    references = pieces.take(queries);       // r: an exponent under kFixedReference, else a score
    norms = pieces.take(queries / M::kRows);  // largest |q| of a row block, infinity once it has a running maximum
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
        // Prefetch the keys of the next block, a few with each row block. Without this, waiting took 1 to 3 %.
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

  /// Returns the query token of a row. Padding rows repeat the last token.
  int64_t token(int64_t row) const { return first_ + smaller(row % padded_, count_ - 1); }

  /// Packs q and starts the sums of every row.
  void start() {
    for (int64_t g = 0; g < group_; ++g) {
      const Source<T> source(x_.q, kv_head_ * group_ + g, first_, count_, x_.head_dim, x_.kv_start, x_.kv_end);
      pack_rows<M>(source, 0, padded_, space_.q + g * padded_ * words_);
    }
    if (x_.scale < 0) negate(space_.q, group_ * padded_ * words_);
    fill(space_.sums, group_ * padded_ * x_.head_dim, 0.0f);
    fill(space_.p_sums, group_ * padded_ * kLanes, 0.0f);
    fill(space_.rounded_p_sums, group_ * padded_ * kLanes, 0.0f);
    fill(space_.references, group_ * padded_, M::kFixedReference ? 0.0f : -kInfinity);
    if constexpr (M::kFixedReference) {
      for (int64_t row = 0; row < group_ * padded_; row += M::kRows) {
        const float norm = norm_of(largest_row_square<M>(space_.q + row * words_, M::kRows, words_));
        space_.norms[row / M::kRows] = norm;
        if (norm == kInfinity) follow_maximum(row);
      }
    }
  }

  /// Flips all signs. The running maximum of s c is c times that of s only for c > 0, so a negative scale moves into q.
  static void negate(float* words, int64_t count) {
    constexpr uint32_t kSigns = M::kStep == 2 ? 0x80008000 : 0x80000000;
    for (int64_t i = 0; i < count; ++i) words[i] = float_of(bits_of(words[i]) ^ kSigns);
  }

  /// Returns an upper bound of a norm from its computed sum of squares: each of the products may have been lost below
  /// kTiny.
  float norm_of(float square) const { return __builtin_sqrtf(square + x_.head_dim * kTiny); }

  /// Packs a block of keys and values, and measures their norms.
  void pack_keys(int64_t key, int64_t count) {
    columns_ = round_up(count, kColumns);
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key, count, x_.head_dim, x_.q_start, x_.q_end);
    };
    pack<M>(source(x_.k), columns_, space_.rows, space_.k, nullptr);
    pack<M>(source(x_.v), columns_, space_.rows, nullptr, space_.v);
    if constexpr (M::kFixedReference) {
      // The norm of a channel of v over the block bounds its elements.
      key_norm_ = norm_of(largest_square<M>(space_.k, words_, columns_));
      const float value = largest_square<M>(space_.v, columns_ / M::kStep, x_.head_dim);
      if (!(value <= kLargestValue * kLargestValue)) key_norm_ = kInfinity;
    }
  }

  /// Adds a block of keys to the sums of a row block.
  void add_keys(int64_t row, int64_t key) {
    const int64_t first = token(row), last = token(row + M::kRows - 1);
    if (x_.kv_end[last] <= key || x_.kv_start[first] >= key + columns_) return;
    M::template matmul<Start::zero>(space_.q + row * words_, words_, space_.k, columns_, M::kRows, columns_, words_,
                                    space_.scores, columns_);
    const bool all = x_.kv_start[last] <= key && x_.kv_end[first] >= key + columns_;
    if (!all) mask(row, key);
    if constexpr (M::kFixedReference) {
      float& norm = space_.norms[row / M::kRows];
      if (norm * key_norm_ * factor_ <= kFixedLimit) {  // false for NaN, also for that of infinity times 0
        for (int64_t i = 0; i < M::kRows; ++i) softmax_row<false>(row, i, 0.0f, 1.0f);
        add_values<Start::sum>(row, nullptr);
        return;
      }
      if (norm != kInfinity) follow_maximum(row);
      norm = kInfinity;
    }
    alignas(64) float factors[kPaddedRows];
    softmax_block(row, factors);
    add_values<Start::scaled>(row, factors);
  }

  /// Adds p v to the sums of a row block, which are first scaled by the factors where kStart says so.
  template <Start kStart>
  void add_values(int64_t row, const float* factors) {
    M::template matmul<kStart>(space_.p, columns_ / M::kStep, space_.v, x_.head_dim, M::kRows, x_.head_dim,
                               columns_ / M::kStep, space_.sums + row * x_.head_dim, x_.head_dim, factors);
  }

  /// Starts the running maximum of a row block. Its sums so far were made with the reference 0; a row that has seen no
  /// key yet starts at -infinity.
  void follow_maximum(int64_t row) {
    for (int64_t i = row; i < row + M::kRows; ++i) {
      space_.references[i] = sum_of(space_.p_sums, i) > 0 ? 0.0f : -kInfinity;
    }
  }

  /// Returns a row's sum over its lanes.
  static float sum_of(const float* lanes, int64_t row) {
    float sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += lanes[row * kLanes + i];
    return sum;
  }

  /// Sets the scores of keys that a row does not see to -infinity.
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

  /// Returns a limit as a distance from the block's first key, which a float holds exactly.
  float from_origin(int64_t limit, int64_t key) const {
    return static_cast<float>(smaller(larger(limit - key, 0), columns_));
  }

  /// One step of the online softmax: raises the running maxima, writes the factors 2^(old r - new r) of the earlier
  /// sums, and turns the scores into probabilities.
  void softmax_block(int64_t row, float* factors) {
    float* reference = space_.references + row;
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
      const float found = top[i] > reference[i] ? top[i] : reference[i];
      top[i] = found == -kInfinity ? 0.0f : found;
      change[i] = (reference[i] - top[i]) * (M::kFixedReference ? 1.0f : factor_);
      reference[i] = found;
    }
    for (int64_t i = 0; i < kPaddedRows; i += kLanes) store(factors + i, exp2<6>(load(change + i)));
    for (int64_t i = 0; i < M::kRows; ++i) softmax_row<true>(row, i, top[i], factors[i]);
  }

  /// Returns p for a score, a factor c and a reference. kLarge: see exp2_product.
  template <bool kLarge>
  static Vec probability(Vec score, Vec factor, Vec reference) {
    if constexpr (M::kFixedReference) return exp2_product<M::kForwardDegree, kLarge>(score, factor, reference);
    return exp2<M::kForwardDegree>((score - reference) * factor);
  }

  /// Turns row i of the scores into probabilities for a reference. The row's sums of p are rescaled first.
  template <bool kLarge>
  void softmax_row(int64_t row, int64_t i, float reference, float rescale) {
    const float* scores = space_.scores + i * columns_;
    float* p = space_.p + i * columns_ / M::kStep;
    const Vec factor = broadcast(factor_), shift = broadcast(reference);
    float *p_sum = space_.p_sums + (row + i) * kLanes, *rounded_p_sum = space_.rounded_p_sums + (row + i) * kLanes;
    Vec first_sum = load(p_sum) * broadcast(rescale), second_sum = broadcast(0.0f);
    Vec rounded_sum = load(rounded_p_sum) * broadcast(rescale);
    for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
      const Vec first = probability<kLarge>(load(scores + j), factor, shift);
      const Vec second = probability<kLarge>(load(scores + j + kLanes), factor, shift);
      first_sum = first_sum + first;
      second_sum = second_sum + second;
      M::store_along(p + j / M::kStep, first, second);
      if constexpr (M::kStep == 2) rounded_sum = M::dot(rounded_sum, M::ones(), load(p + j / 2));
    }
    if constexpr (M::kStep == 2) store(rounded_p_sum, rounded_sum);
    store(p_sum, first_sum + second_sum);
  }

  /// Writes o and lse.
  void finish() {
    const double unit = M::kFixedReference ? 1 / kLog2E : ::fabs(x_.scale);  // turns a reference into r ln 2
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t t = 0; t < count_; ++t) {
        const int64_t row = g * padded_ + t;
        const float sum = sum_of(space_.p_sums, row);
        const bool empty = x_.kv_start[first_ + t] >= x_.kv_end[first_ + t];
        const double lse = space_.references[row] * unit + ::log(static_cast<double>(sum));
        x_.lse[head * x_.queries + first_ + t] = empty ? -kInfinity : static_cast<float>(lse);
        T* o = static_cast<T*>(x_.o.data) + (first_ + t) * x_.o.token_stride + head * x_.o.head_stride;
        const float* sums = space_.sums + row * x_.head_dim;
        const Vec inverse = broadcast(empty ? 0.0f : 1.0f / sum_of(space_.rounded_p_sums, row));
        for (int64_t d = 0; d < x_.head_dim; d += kLanes) store(o + d, load(sums + d) * inverse);
      }
    }
  }

  const FrameAttentionProblem& x_;
  ForwardSpace<M> space_;
  int64_t kv_head_, group_, first_, count_, padded_, words_, columns_ = 0;
  float factor_;  // c
  float key_norm_ = 0;  // largest |k| of the block, infinity where v is too large for the reference 0
};

}  // namespace
}  // namespace lumos
