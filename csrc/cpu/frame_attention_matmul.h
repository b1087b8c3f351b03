// The matmul under frame attention: C[m, n] = A[m, k] B[k, n] out of packed operands, fp32 sums in registers.
//
// Operands are 32-bit words in float arrays. Under Fp32 a word is a float; under Bf16 (AVX512_BF16) it is two bf16 that
// are neighbours along k, whose products one instruction adds. With kStep channels to a word:
//     rows     [n][k / kStep]   operand A
//     columns  [k / kStep][n]   operand B
// Both are made from [n][k] storage by rows() (k along memory) or pairs() (k across rows) and a transpose of words.
#pragma once

#include <cstdint>
#include <cstring>

#include "lumos/simd_math.h"
#include "lumos/views.h"

namespace lumos {
namespace {

/// Rows of a register block. 6 x 4 vectors fill 24 of AVX-512's 32 registers, 6 x 2 fill 12 of the 16 elsewhere.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kBlockVecs = 4;
#else
constexpr int kBlockVecs = 2;
#endif

struct Fp32 {
  static constexpr int kStep = 1;
  static constexpr int kForwardDegree = 6, kBackwardDegree = 6;  // of exp2

  static Vec dot(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  /// 2 * kLanes neighbours along k of an operand A.
  static void store_along(float* to, Vec first, Vec second) {
    store(to, first);
    store(to + kLanes, second);
  }
};

#if defined(LUMOS_AVX512_BF16)
struct Bf16 {
  static constexpr int kStep = 2;
  static constexpr int kForwardDegree = 5, kBackwardDegree = 3;  // lse is fp32, what backward makes is rounded to bf16

  static Vec dot(Vec sum, Vec a, Vec b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  static void store_along(float* to, Vec first, Vec second) {
    _mm512_storeu_ps(to, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(second.v, first.v)));
  }
  /// Words whose halves are the two vectors' lanes: neighbours along k lie in two rows.
  static Vec across(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first.v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second.v)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  /// The same from storage.
  static Vec across(const BFloat16* first, const BFloat16* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#endif

// ---- packing ----

/// Rows of one head, from `first` on. Rows whose limits are empty, and rows from `count` on, are read as zeros: what
/// nobody may see can hold anything, and 0 * NaN is NaN.
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

/// to [padded][D / kStep]: an operand A along the channels.
template <class M, class T>
inline void pack_rows(const Source<T>& source, int64_t padded, float* to) {
  const int64_t words = source.head_dim / M::kStep;
  for (int64_t i = 0; i < padded; ++i, to += words) {
    const T* row = source.row(i);
    if (!row) {
      std::memset(to, 0, words * sizeof(float));
    } else if constexpr (sizeof(T) * M::kStep == sizeof(float)) {
      std::memcpy(to, row, words * sizeof(float));
    } else {
      for (int64_t d = 0; d < words; d += kLanes) store(to + d, load(row + d));
    }
  }
}

/// to [padded / kStep][D] from rows: an operand B along the tokens. Under Fp32 the rows are that already.
template <class M>
inline void pairs_of_rows(const float* rows, int64_t padded, int64_t head_dim, float* to) {
  if constexpr (M::kStep == 1) {
    std::memcpy(to, rows, padded * head_dim * sizeof(float));
  } else {
    const auto* from = reinterpret_cast<const BFloat16*>(rows);
    for (int64_t i = 0; i < padded; i += 2, from += 2 * head_dim, to += head_dim) {
      for (int64_t d = 0; d < head_dim; d += kLanes) store(to + d, M::across(from + d, from + head_dim + d));
    }
  }
}

// ---- the product ----

enum class Start { zero, sum, scaled };  // what is added to: nothing, C, or C times a factor for each row

template <class M, int kRows, int kVecs, Start kStart>
inline void block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
                  int64_t c_stride, const float* factors) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[i][j] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < steps; ++k, b += b_stride) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = M::dot(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      // What C holds comes last: summed into it step by step, small terms would lose more bits.
      if constexpr (kStart == Start::sum) sums[i][j] = load(to) + sums[i][j];
      if constexpr (kStart == Start::scaled) sums[i][j] = fma(load(to), broadcast(factors[i]), sums[i][j]);
      store(to, sums[i][j]);
    }
  }
}

template <class M, int kVecs, Start kStart>
inline void panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t steps,
                  float* c, int64_t c_stride, const float* factors) {
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    block<M, kBlockRows, kVecs, kStart>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride, c_stride,
                                        kStart == Start::scaled ? factors + i : nullptr);
  }
  for (; i < rows; i += 2) {
    block<M, 2, kVecs, kStart>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride, c_stride,
                               kStart == Start::scaled ? factors + i : nullptr);
  }
}

template <class M, Start kStart>
[[gnu::noinline]] void matmul_run(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                  int64_t columns, int64_t steps, float* c, int64_t c_stride, const float* factors) {
  constexpr int kWide = kBlockVecs * kLanes;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    panel<M, kBlockVecs, kStart>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
  for (; j < columns; j += 2 * kLanes) {
    panel<M, 2, kStart>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
}

/// C [rows, columns] from A [rows, steps] and B [steps, columns] in words; rows are even, columns multiples of 32.
///
/// Under Fp32 the steps are summed in runs: with one long chain the error was 2 to 3 times that of torch's matmul.
template <class M, Start kStart>
inline void matmul(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                   int64_t steps, float* c, int64_t c_stride, const float* factors = nullptr) {
  constexpr int64_t kRun = M::kStep == 2 ? INT64_MAX : kStart == Start::zero ? 16 : 32;
  const int64_t run = steps < kRun ? steps : kRun;
  matmul_run<M, kStart>(a, a_stride, b, b_stride, rows, columns, run, c, c_stride, factors);
  for (int64_t k = run; k < steps; k += kRun) {
    const int64_t left = steps - k < kRun ? steps - k : kRun;
    matmul_run<M, Start::sum>(a + k, a_stride, b + k * b_stride, b_stride, rows, columns, left, c, c_stride, nullptr);
  }
}

}  // namespace
}  // namespace lumos
