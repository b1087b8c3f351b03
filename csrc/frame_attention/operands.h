// The operands of frame attention's matmuls and how tensors are packed into them.
//
// An operand is an array of 32-bit words, stored as floats. A word is one float (kStep 1) or two bf16 (kStep 2) that
// are neighbours along the summed dimension k. One instruction multiplies words and adds the products. The matmul
//     C[m, n] = A[m, k] B[k, n]
// takes the operands
//     A  [m][k / kStep]
//     B  [k / kStep][n]
// AMX tiles of bf16 take the same operands.
//
// A tensor [token][channel] is packed in four ways:
//     pack_rows                              operand A, summed along the channels
//     pack_rows, transpose                   operand B, summed along the channels
//     pack_rows, interleave_rows             operand B, summed along the tokens
//     pack_rows, interleave_rows, transpose  operand A, summed along the tokens
// pack_rows pairs bf16 that are neighbours in a row, and interleave_rows pairs bf16 of two rows. transpose moves whole
// words.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/math.h"
#include "simd/views.h"

namespace lumos {
namespace {

constexpr int64_t kColumns = 32;  // the columns of a matmul are a multiple of this

struct Fp32Words {
  static constexpr int kStep = 1;
  static constexpr int kForwardDegree = 6, kBackwardDegree = 6;  // of exp2's polynomial

  static Vec dot(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  /// Writes 2 * kLanes neighbours along k of an operand A.
  static void store_words(float* to, Vec first, Vec second) {
    store(to, first);
    store(to + kLanes, second);
  }
};

#if defined(LUMOS_AVX512_BF16)
struct Bf16Words {
  static constexpr int kStep = 2;
  /// Forward needs the higher degree, since lse is fp32. All that backward computes with exp2 is rounded to bf16.
  static constexpr int kForwardDegree = 5, kBackwardDegree = 3;

  static Vec dot(Vec sum, Vec a, Vec b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  static Vec ones() { return {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}; }

  static void store_words(float* to, Vec first, Vec second) {
    _mm512_storeu_ps(to, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(second.v, first.v)));
  }
  /// Returns words of a lane of `first` and the same lane of `second`, for neighbours along k that lie in two rows.
  static Vec interleave(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first.v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second.v)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  /// Does the same with rows in memory.
  static Vec interleave(const BFloat16* first, const BFloat16* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#endif

/// The rows of one head, from token `first` on. A row with after[i] <= before[i] takes part in no attention. It may hold
/// anything, and 0 * NaN is NaN, so it is read as zeros. Rows from `count` on are padding, also zeros.
///
/// For queries `before` and `after` are the first values of kv_start and kv_end. For keys `before` is null, which counts
/// as zeros, and `after` says which keys are seen.
template <class T>
struct Source {
  const T* data;
  int64_t stride, count, head_dim;
  const int32_t *before, *after;

  Source(const ConstHeads& x, int64_t head, int64_t first, int64_t count, int64_t head_dim, const int32_t* before,
         const int32_t* after)
      : data(static_cast<const T*>(x.data) + first * x.token_stride + head * x.head_stride),
        stride(x.token_stride),
        count(count),
        head_dim(head_dim),
        before(before),
        after(after) {}
  /// Returns row i, or null where the row is read as zeros.
  const T* row(int64_t i) const {
    return i < count && (before ? before[i] : 0) < after[i] ? data + i * stride : nullptr;
  }
};

/// Packs rows [first, first + rows) to an operand A [rows][head_dim / kStep], summed along the channels.
template <class M, class T>
inline void pack_rows(const Source<T>& source, int64_t first, int64_t rows, float* to) {
  const int64_t words = source.head_dim / M::kStep;
  for (int64_t i = first; i < first + rows; ++i, to += words) {
    const T* row = source.row(i);
    if (!row) {
      std::memset(to, 0, words * sizeof(float));
    } else if constexpr (sizeof(T) * M::kStep == sizeof(float)) {
      const auto* from = reinterpret_cast<const float*>(row);
      for (int64_t d = 0; d < words; d += kLanes) store(to + d, load(from + d));  // faster than a call of memcpy
    } else {
      for (int64_t d = 0; d < words; d += kLanes) store(to + d, load(row + d));
    }
  }
}

/// Packs rows to an operand B [rows / kStep][head_dim], summed along the tokens. With kStep 1 this is a copy.
template <class M>
inline void interleave_rows(const float* from, int64_t rows, int64_t head_dim, float* to) {
  if constexpr (M::kStep == 1) {
    std::memcpy(to, from, rows * head_dim * sizeof(float));
  } else {
    const auto* row = reinterpret_cast<const BFloat16*>(from);
    for (int64_t i = 0; i < rows; i += 2, row += 2 * head_dim, to += head_dim) {
      for (int64_t d = 0; d < head_dim; d += kLanes) store(to + d, M::interleave(row + d, row + head_dim + d));
    }
  }
}

/// Packs `rows` rows, a multiple of kColumns, to operands B: `by_channel` [head_dim / kStep][rows], summed along the
/// channels, and `by_token` [rows / kStep][head_dim], summed along the tokens. Either may be null.
///
/// `staging` holds kColumns rows at a time, which stay in L1. With all rows at once packing missed L1 and took twice
/// the time.
template <class M, class T>
inline void pack(const Source<T>& source, int64_t rows, float* staging, float* by_channel, float* by_token) {
  const int64_t words = source.head_dim / M::kStep;
  for (int64_t i = 0; i < rows; i += kColumns) {
    pack_rows<M>(source, i, kColumns, staging);
    if (by_channel) transpose(staging, words, kColumns, words, by_channel + i, rows);
    if (by_token) interleave_rows<M>(staging, kColumns, source.head_dim, by_token + i / M::kStep * source.head_dim);
  }
}

/// Returns the largest sum of squares of a column of words [rows][columns], or NaN if any sum is NaN or infinite.
template <class M>
inline float largest_column_square(const float* words, int64_t rows, int64_t columns) {
  Vec largest = broadcast(0.0f);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec sum = broadcast(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec word = load(words + i * columns + j);
      sum = M::dot(sum, word, word);
    }
    // sum - sum is 0, or NaN where sum is NaN or infinite. Without it the maximum would drop a NaN.
    largest = maximum(sum, largest + (sum - sum));
  }
  alignas(64) float lanes[kLanes];
  store(lanes, largest);
  float found = 0;
  for (float lane : lanes) found = found >= lane ? found : lane;
  for (float lane : lanes) found += lane - lane;
  return found;
}

/// Returns the largest sum of squares of a row of words [rows][columns]. A row with a NaN does not count.
template <class M>
inline float largest_row_square(const float* words, int64_t rows, int64_t columns) {
  float found = 0;
  for (int64_t i = 0; i < rows; ++i, words += columns) {
    Vec sum = broadcast(0.0f);
    for (int64_t j = 0; j < columns; j += kLanes) sum = M::dot(sum, load(words + j), load(words + j));
    alignas(64) float lanes[kLanes];
    store(lanes, sum);
    float square = 0;
    for (float lane : lanes) square += lane;
    found = square > found ? square : found;
  }
  return found;
}

}  // namespace
}  // namespace lumos
