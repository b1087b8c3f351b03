// The forward pass of frame attention, an online softmax. A query row i sees the keys j of one range:
//     s_ij  = q_i . k_j
//     p_ij  = 2^(factor s_ij - r_i)            factor = |scale| log2(e); pack_queries negates q if scale < 0
//     o_i   = (sum_j p_ij v_j) / (sum_j p_ij)
//     lse_i = r_i ln(2) + ln(sum_j p_ij)
// In exact arithmetic o and lse are the same for every reference r_i. Where the matmul takes bf16, both sums of o
// are of the p rounded to bf16, and the sum of lse is of the fp32 p.
//
// An item is a kv head and a tile of query tokens, with all query heads of the kv head. It packs its queries once, then
// one block of keys after the other. Each block of keys passes all rows of the item, M::kRows at a time (a row block).
//
// A reference r_i is one of two kinds.
//
// A running maximum is the largest exponent of the keys so far. When it rises, softmax_tile returns the factor by which
// the earlier sums of the row shrink. With M::kFixedReference the maximum is rounded to an integer. Without it, the
// exponent is computed as (s - maximum) factor, so that the row of one key has p = 1 and its o is v exactly, in fp32
// too.
//
// The fixed reference (M::kFixedReference) is 0, which needs no pass for the maximum and scales no sums. add_keys
// allows it while |q| |k| factor <= kFixedLimit, for the largest |q| of the row block and the largest |k| of the block
// of keys. By Cauchy and Schwarz that product bounds |factor s|; the rounding of the scores adds 1e-4 of it at most.
// Then p lies between 2^-31 and 2^31, which fp32 and bf16 hold with all their bits. pack_keys also asks for
// |v| <= kLargestValue = 2^60, so that a sum of 2^36 terms does not overflow. At the first block of keys that is too
// large or not finite, a row block switches to the running maximum for good.
//
// A row's result must not depend on what the row does not see. Masked keys and other rows of the block do count in the
// norms, so they can decide which reference a row has. With M::kFixedReference every reference is an integer, so
// another one multiplies p and the sums by a power of 2 and changes no bit of the result. The exceptions are terms that
// fp32 loses under one reference and holds under the other: terms of values |v| < 2^-64 or of probabilities below
// 2^-60.
//
// The limits may come in any order. pack_queries finds for each row block the lowest and highest key that its rows see,
// and the keys that all of them see (Visible). run() and add_keys skip keys by these bounds, and a block of keys that all
// rows see is not masked.
#pragma once

#include "frame_attention/shared.h"

namespace lumos {
namespace {

constexpr float kFixedLimit = 30.0f;
constexpr float kLargestValue = 0x1p60f;

/// The buffers of an item. Rows are query head by query head, each with the tokens of the tile padded to M::kRows.
template <class M>
struct ForwardSpace {
  float *q, *pv_sums, *p_sums, *rounded_sums, *references, *q_norms, *staging, *k, *v, *scores, *p;
  int32_t* seen_keys;
  Visible* visible;  // of each row block; the query heads share them
  int64_t size;

  ForwardSpace(const FrameAttentionProblem& x, float* scratch) {
    const int64_t queries = x.q_heads / x.kv_heads * x.tile, keys = M::key_block(x.head_dim);
    Arena arena(scratch);
    q = arena.take(queries * x.head_dim / M::kStep);
    pv_sums = arena.take(queries * x.head_dim);
    p_sums = arena.take(queries * kLanes);  // one sum of p for each lane
    rounded_sums = M::kStep == 1 ? p_sums : arena.take(queries * kLanes);  // p_sums of p rounded to bf16
    references = arena.take(queries);       // exponents with M::kFixedReference, else scores
    q_norms = arena.take(queries / M::kRows);  // bound of |q| in a row block; infinity if it has a running maximum
    staging = arena.take(kColumns * x.head_dim / M::kStep);
    k = arena.take(keys * x.head_dim / M::kStep);
    v = arena.take(keys * x.head_dim / M::kStep);
    scores = arena.take(M::kRows * keys);
    p = arena.take(M::kRows * keys / M::kStep);
    seen_keys = arena.take<int32_t>(keys + 1);
    visible = arena.take<Visible>(round_up(x.tile, M::kRows) / M::kRows);
    size = arena.taken();
  }
};

/// One item of the forward pass.
template <class T, class M>
class Forward {
 public:
  Forward(const FrameAttentionProblem& problem, int64_t kv_head, int64_t first_token, float* scratch)
      : x_(problem),
        space_(problem, scratch),
        kv_head_(kv_head),
        group_(problem.q_heads / problem.kv_heads),
        first_token_(first_token),
        tokens_(smaller(problem.tile, problem.queries - first_token)),
        padded_tokens_(round_up(tokens_, M::kRows)),
        row_words_(problem.head_dim / M::kStep),
        factor_(static_cast<float>(::fabs(problem.scale) * kLog2E) + kTiny) {}

  void run() {
    pack_queries();
    int64_t first = x_.keys, end = 0;
    for (int64_t row = 0; row < padded_tokens_; row += M::kRows) {
      const Visible& seen = space_.visible[row / M::kRows];
      first = smaller(first, seen.first);
      end = larger(end, seen.end);
    }
    const int64_t width = M::key_block(x_.head_dim);
    for (int64_t key = first; key < end; key += width) {
      if (!pack_keys(key, smaller(width, end - key))) continue;
      const int64_t rows = group_ * padded_tokens_, next = key + width, next_count = smaller(width, end - next);
      for (int64_t row = 0; row < rows; row += M::kRows) {
        // Each row block prefetches a few keys of the next block. Waiting for them took 1 to 3 % of the time.
        for (int64_t i = next_count * row / rows; i < next_count * (row + M::kRows) / rows; ++i) {
          prefetch_row<3, T>(x_.k, next + i, kv_head_, x_.head_dim);
          prefetch_row<3, T>(x_.v, next + i, kv_head_, x_.head_dim);
        }
        add_keys(row, key);
      }
    }
    write_o_and_lse();
  }

 private:
  static constexpr int64_t kPaddedRows = (M::kRows + 15) / 16 * 16;

  /// Returns the query token of a row. Padding repeats the last token.
  int64_t token(int64_t row) const { return first_token_ + smaller(row % padded_tokens_, tokens_ - 1); }

  /// Packs the queries of the item, clears its sums and finds what each row block sees. With M::kFixedReference, bounds
  /// |q| of each row block.
  void pack_queries() {
    for (int64_t row = 0; row < padded_tokens_; row += M::kRows) {
      space_.visible[row / M::kRows] = visible_keys(x_, first_token_ + row, smaller(M::kRows, tokens_ - row));
    }
    for (int64_t g = 0; g < group_; ++g) {
      const Source<T> source(x_.q, kv_head_ * group_ + g, first_token_, tokens_, x_.head_dim,
                             x_.kv_start + first_token_, x_.kv_end + first_token_);
      pack_rows<M>(source, 0, padded_tokens_, space_.q + g * padded_tokens_ * row_words_);
    }
    if (x_.scale < 0) negate(space_.q, group_ * padded_tokens_ * row_words_);
    fill(space_.pv_sums, group_ * padded_tokens_ * x_.head_dim, 0.0f);
    fill(space_.p_sums, group_ * padded_tokens_ * kLanes, 0.0f);
    fill(space_.rounded_sums, group_ * padded_tokens_ * kLanes, 0.0f);
    fill(space_.references, group_ * padded_tokens_, M::kFixedReference ? 0.0f : -kInfinity);
    if constexpr (M::kFixedReference) {
      for (int64_t row = 0; row < group_ * padded_tokens_; row += M::kRows) {
        const float norm = norm_of(largest_row_square<M>(space_.q + row * row_words_, M::kRows, row_words_));
        space_.q_norms[row / M::kRows] = norm;
        if (norm == kInfinity) switch_to_running_maximum(row);
      }
    }
  }

  /// Changes the sign of every value. The largest score gives the largest exponent only if the scale is not negative.
  static void negate(float* words, int64_t count) {
    constexpr uint32_t kSigns = M::kStep == 2 ? 0x80008000 : 0x80000000;
    for (int64_t i = 0; i < count; ++i) words[i] = float_of(bits_of(words[i]) ^ kSigns);
  }

  /// Returns an upper bound of a norm from a sum of squares. The dots that summed them add no products below kTiny, so
  /// the bound adds kTiny for each.
  float norm_of(float square) const { return __builtin_sqrtf(square + x_.head_dim * kTiny); }

  /// Packs k and v of a block of keys. With M::kFixedReference, bounds |k| and tests the size of v. Returns false, and
  /// packs nothing, if no row sees a key of the block.
  bool pack_keys(int64_t key, int64_t count) {
    columns_ = round_up(count, kColumns);
    bool any = false;
    for (int64_t row = 0; row < padded_tokens_; row += M::kRows) any = any || sees(row, key);
    if (!any) return false;
    SeenKeys seen(key, count, space_.seen_keys);
    seen.add(x_, first_token_, tokens_);
    const int32_t* is_seen = seen.finish();
    const auto source = [&](const ConstHeads& tensor) {
      return Source<T>(tensor, kv_head_, key, count, x_.head_dim, nullptr, is_seen);
    };
    pack<M>(source(x_.k), columns_, space_.staging, space_.k, nullptr);
    pack<M>(source(x_.v), columns_, space_.staging, nullptr, space_.v);
    if constexpr (M::kFixedReference) {
      key_norm_ = norm_of(largest_column_square<M>(space_.k, row_words_, columns_));
      const float value_square = largest_column_square<M>(space_.v, columns_ / M::kStep, x_.head_dim);
      // The norm of a channel over the block bounds each of its values. The negation also catches NaN.
      if (!(value_square <= kLargestValue * kLargestValue)) key_norm_ = kInfinity;
    }
    return true;
  }

  const Visible& visible(int64_t row) const { return space_.visible[row % padded_tokens_ / M::kRows]; }
  /// Returns whether the bounds of the row block that begins at `row` reach into the block of keys.
  bool sees(int64_t row, int64_t key) const {
    return visible(row).first < key + columns_ && visible(row).end > key;
  }

  /// Adds the packed block of keys, which begins at `key`, to the sums of the row block that begins at `row`.
  void add_keys(int64_t row, int64_t key) {
    if (!sees(row, key)) return;
    M::template matmul<Update::assign>(space_.q + row * row_words_, row_words_, space_.k, columns_, M::kRows, columns_,
                                       row_words_, space_.scores, columns_);
    const bool all_seen = visible(row).whole_first <= key && visible(row).whole_end >= key + columns_;
    if (!all_seen) mask(row, key);
    if constexpr (M::kFixedReference) {
      float& norm = space_.q_norms[row / M::kRows];
      if (norm * key_norm_ * factor_ <= kFixedLimit) {  // false for NaN, and infinity times 0 is NaN
        for (int64_t i = 0; i < M::kRows; ++i) row_probabilities<false>(row, i, 0.0f, 1.0f);
        add_p_v<Update::add>(row, nullptr);
        return;
      }
      if (norm != kInfinity) switch_to_running_maximum(row);
      norm = kInfinity;
    }
    alignas(64) float rescales[kPaddedRows];
    softmax_tile(row, rescales);
    add_p_v<Update::scale_and_add>(row, rescales);
  }

  template <Update kUpdate>
  void add_p_v(int64_t row, const float* rescales) {
    M::template matmul<kUpdate>(space_.p, columns_ / M::kStep, space_.v, x_.head_dim, M::kRows, x_.head_dim,
                                columns_ / M::kStep, space_.pv_sums + row * x_.head_dim, x_.head_dim, rescales);
  }

  /// The sums of a row block so far are relative to 0, so each of its rows starts from the maximum 0. A row that has
  /// seen no key yet starts from -infinity.
  void switch_to_running_maximum(int64_t row) {
    for (int64_t i = row; i < row + M::kRows; ++i) {
      space_.references[i] = sum_of(space_.p_sums, i) > 0 ? 0.0f : -kInfinity;
    }
  }

  static float sum_of(const float* lane_sums, int64_t row) {
    float sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += lane_sums[row * kLanes + i];
    return sum;
  }

  /// Sets the scores of keys that a row does not see to -infinity.
  void mask(int64_t row, int64_t key) {
    const Vec minus_infinity = broadcast(-kInfinity), numbers = lane_numbers();
    for (int64_t i = 0; i < M::kRows; ++i) {
      const Vec low = broadcast(limit_in_block(x_.kv_start[token(row + i)], key));
      const Vec high = broadcast(limit_in_block(x_.kv_end[token(row + i)], key));
      float* scores = space_.scores + i * columns_;
      for (int64_t j = 0; j < columns_; j += kLanes) {
        const Vec index = numbers + broadcast(static_cast<float>(j));
        store(scores + j, select_between(low, index, high, load(scores + j), minus_infinity));
      }
    }
  }

  /// Returns a limit relative to the block's first key. It is clamped to the block, so a float holds it exactly.
  float limit_in_block(int64_t limit, int64_t key) const {
    return static_cast<float>(smaller(larger(limit - key, 0), columns_));
  }

  /// Raises the running maximum of each row by the scores, turns the scores into probabilities relative to it, and
  /// writes to `rescales` the factor that brings each row's earlier sums to it.
  void softmax_tile(int64_t row, float* rescales) {
    float* running_maximum = space_.references + row;
    alignas(64) float maxima[kPaddedRows] = {}, change[kPaddedRows] = {};
    for (int64_t i = 0; i < M::kRows; ++i) {
      const float* scores = space_.scores + i * columns_;
      Vec largest = load(scores);
      for (int64_t j = kLanes; j < columns_; j += kLanes) largest = maximum(largest, load(scores + j));
      maxima[i] = max_lane(largest);
    }
    if constexpr (M::kFixedReference) {
      for (int64_t i = 0; i < kPaddedRows; i += kLanes) {
        store(maxima + i, round_to_integer(load(maxima + i) * broadcast(factor_)));
      }
    }
    for (int64_t i = 0; i < M::kRows; ++i) {
      const float raised = maxima[i] > running_maximum[i] ? maxima[i] : running_maximum[i];
      maxima[i] = raised == -kInfinity ? 0.0f : raised;  // 0 where the row has seen no key
      change[i] = (running_maximum[i] - maxima[i]) * (M::kFixedReference ? 1.0f : factor_);
      running_maximum[i] = raised;
    }
    for (int64_t i = 0; i < kPaddedRows; i += kLanes) store(rescales + i, exp2<6>(load(change + i)));
    for (int64_t i = 0; i < M::kRows; ++i) row_probabilities<true>(row, i, maxima[i], rescales[i]);
  }

  /// Returns p. kLarge says that exponents may exceed kFixedLimit (see exp2_product).
  template <bool kLarge>
  static Vec probability(Vec score, Vec factor, Vec reference) {
    if constexpr (M::kFixedReference) return exp2_product<M::kForwardDegree, kLarge>(score, factor, reference);
    return exp2<M::kForwardDegree>((score - reference) * factor);
  }

  /// Turns row i of the scores into probabilities relative to `reference`. Multiplies the row's sums of p by `rescale`,
  /// then adds the new p.
  template <bool kLarge>
  void row_probabilities(int64_t row, int64_t i, float reference, float rescale) {
    const float* scores = space_.scores + i * columns_;
    float* p = space_.p + i * columns_ / M::kStep;
    const Vec factor = broadcast(factor_), shift = broadcast(reference);
    float *p_sums = space_.p_sums + (row + i) * kLanes, *rounded_sums = space_.rounded_sums + (row + i) * kLanes;
    Vec first_sum = load(p_sums) * broadcast(rescale), second_sum = broadcast(0.0f);
    Vec rounded_sum = load(rounded_sums) * broadcast(rescale);
    for (int64_t j = 0; j < columns_; j += 2 * kLanes) {
      const Vec first = probability<kLarge>(load(scores + j), factor, shift);
      const Vec second = probability<kLarge>(load(scores + j + kLanes), factor, shift);
      first_sum = first_sum + first;
      second_sum = second_sum + second;
      M::store_words(p + j / M::kStep, first, second);
      if constexpr (M::kStep == 2) rounded_sum = M::dot(rounded_sum, M::ones(), load(p + j / 2));
    }
    if constexpr (M::kStep == 2) store(rounded_sums, rounded_sum);
    store(p_sums, first_sum + second_sum);
  }

  void write_o_and_lse() {
    // A reference times this unit is a natural logarithm.
    const double unit = M::kFixedReference ? 1 / kLog2E : ::fabs(x_.scale);
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t t = 0; t < tokens_; ++t) {
        const int64_t row = g * padded_tokens_ + t;
        const float sum = sum_of(space_.p_sums, row);
        const bool empty = x_.kv_start[first_token_ + t] >= x_.kv_end[first_token_ + t];
        const double lse = space_.references[row] * unit + ::log(static_cast<double>(sum));
        x_.lse[head * x_.queries + first_token_ + t] = empty ? -kInfinity : static_cast<float>(lse);
        T* o = static_cast<T*>(x_.o.data) + (first_token_ + t) * x_.o.token_stride + head * x_.o.head_stride;
        const float* pv_sums = space_.pv_sums + row * x_.head_dim;
        const Vec inverse = broadcast(empty ? 0.0f : 1.0f / sum_of(space_.rounded_sums, row));
        for (int64_t d = 0; d < x_.head_dim; d += kLanes) store(o + d, load(pv_sums + d) * inverse);
      }
    }
  }

  const FrameAttentionProblem& x_;
  ForwardSpace<M> space_;
  int64_t kv_head_, group_, first_token_, tokens_, padded_tokens_, row_words_;
  int64_t columns_ = 0;  // keys of the block, padded to kColumns
  float factor_;        // |scale| log2(e), never 0 (see kTiny)
  float key_norm_ = 0;  // largest |k| of the block of keys; infinity if its v is too large for the fixed reference
};

}  // namespace
}  // namespace lumos
