// The operands of frame attention's matmuls, and how tensors are packed into them.
//
// An operand is an array of 32-bit words, declared as float. A word is one float, or two bf16 that are neighbours along
// the summed dimension k: one instruction multiplies both and adds both products. With kStep elements to a word,
// C[m, n] = A[m, k] B[k, n] takes
//     A as rows     [m][k / kStep],
//     B as columns  [k / kStep][n].
// Tensors are stored [token][channel]. Where k are the channels, pack_rows gives the words, and a transpose of words
// turns rows into columns. Where k are the tokens, pairs_of_rows gives the columns. The bf16 tiles of AMX take the same
// two forms.
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
  static constexpr int kForwardDegree = 6, kBackwardDegree = 6;  // of the polynomial of exp2

  static Vec dot(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  /// Stores 2 * kLanes neighbours along k of an operand A.
  static void store_along(float* to, Vec first, Vec second) {
    store(to, first);
    store(to + kLanes, second);
  }
};

#if defined(LUMOS_AVX512_BF16)
struct Bf16Words {
  static constexpr int kStep = 2;
  static constexpr int kForwardDegree = 5, kBackwardDegree = 3;  // lse is fp32; backward rounds p and ds to bf16

  static Vec dot(Vec sum, Vec a, Vec b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  static Vec ones() { return {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}; }

  static void store_along(float* to, Vec first, Vec second) {
    _mm512_storeu_ps(to, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(second.v, first.v)));
  }
  /// Returns words whose halves are the lanes of the two vectors: neighbours along k lie in two rows.
  static Vec across(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first.v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second.v)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  /// Returns such words from two rows of storage.
  static Vec across(const BFloat16* first, const BFloat16* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#endif

/// Rows of one head, from `first` on. Rows whose limits are empty, and rows from `count` on, are read as zeros: a row
/// that nobody sees may hold anything, and 0 * NaN would be NaN.
template <class T>
struct Source {
  const T* data;
  int64_t stride, count, head_dim;
  const int32_t *start, *end;

  Source(const ConstHeads& x, int64_t head, int64_t first, int64_t count, int64_t head_dim, const int32_t* start,
         const int32_t* end)
      : data(static_cast<const T*>(x.data) + first * x.token_stride + head * x.head_stride),
        stride(x.token_stride),
        count(count),
        head_dim(head_dim),
        start(start + first),
        end(end + first) {}
  const T* row(int64_t i) const { return i < count && start[i] < end[i] ? data + i * stride : nullptr; }
};

/// Packs the rows [first, first + rows) into words [rows][D / kStep]: an operand A whose k are the channels.
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

/// Packs rows into words [rows / kStep][D]: an operand B whose k are the tokens. In fp32 the rows already have that
/// form.
template <class M>
inline void pairs_of_rows(const float* from, int64_t rows, int64_t head_dim, float* to) {
  if constexpr (M::kStep == 1) {
    std::memcpy(to, from, rows * head_dim * sizeof(float));
  } else {
    const auto* row = reinterpret_cast<const BFloat16*>(from);
    for (int64_t i = 0; i < rows; i += 2, row += 2 * head_dim, to += head_dim) {
      for (int64_t d = 0; d < head_dim; d += kLanes) store(to + d, M::across(row + d, row + head_dim + d));
    }
  }
}

/// Packs rows, a multiple of kColumns, as operands B. columns [D / kStep][rows] has the channels as k, pairs
/// [rows / kStep][D] the tokens; a null one is left out.
///
/// `few` holds kColumns rows in between, which stay in L1. Packing all rows at once missed L1 and took twice the time.
template <class M, class T>
inline void pack(const Source<T>& source, int64_t rows, float* few, float* columns, float* pairs) {
  const int64_t words = source.head_dim / M::kStep;
  for (int64_t i = 0; i < rows; i += kColumns) {
    pack_rows<M>(source, i, kColumns, few);
    if (columns) transpose(few, words, kColumns, words, columns + i, rows);
    if (pairs) pairs_of_rows<M>(few, kColumns, source.head_dim, pairs + i / M::kStep * source.head_dim);
  }
}

/// Returns the largest sum of squares down a column of words [rows][columns], NaN where one of the sums is NaN.
template <class M>
inline float largest_square(const float* words, int64_t rows, int64_t columns) {
  Vec largest = broadcast(0.0f);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec sum = broadcast(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec word = load(words + i * columns + j);
      sum = M::dot(sum, word, word);
    }
    largest = maximum(sum, largest + (sum - sum));  // sum - sum makes a NaN or an infinity stick
  }
  alignas(64) float lanes[kLanes];
  store(lanes, largest);
  float found = 0;
  for (float lane : lanes) found = found >= lane ? found : lane;
  for (float lane : lanes) found += lane - lane;
  return found;
}

/// Returns the largest sum of squares along a row of words [rows][columns]. Rows with a NaN do not count.
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
