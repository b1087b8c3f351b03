// Vec, a vector of eight floats with AVX2, FMA and F16C. base.h says which functions there are and why the namespace is
// anonymous.
#pragma once

#include <immintrin.h>

#include "simd/half.h"
#include "simd/sum4.h"

namespace lumos {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }

/// Returns four sums that together hold all lanes of a.
inline __m128 sum_to_four(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
}
inline void sum4(float* to, Vec a, Vec b, Vec c, Vec d) {
  _mm_storeu_ps(to, sum4(sum_to_four(a), sum_to_four(b), sum_to_four(c), sum_to_four(d)));
}

inline Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
inline Vec load(const BFloat16* from) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16))};
}
inline Vec load(const Half* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}

inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a.v); }
inline void store(BFloat16* to, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i nan = _mm256_set1_epi32(0x7fc00000);
  const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(is_nan)), 16);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}
inline void store(Half* to, Vec a) {
  const __m128i narrow = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}

}  // namespace
}  // namespace lumos
