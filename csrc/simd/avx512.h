// Vec, a vector of sixteen floats with AVX-512 F, BW, VL and DQ. base.h says which functions there are and why the
// namespace is anonymous.
#pragma once

#include <immintrin.h>

#include "simd/half.h"
#include "simd/sum4.h"

namespace lumos {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }

/// Returns four sums that together hold all lanes of a.
inline __m128 sum_to_four(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
inline void sum4(float* to, Vec a, Vec b, Vec c, Vec d) {
  _mm_storeu_ps(to, sum4(sum_to_four(a), sum_to_four(b), sum_to_four(c), sum_to_four(d)));
}

inline Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Vec load(const BFloat16* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16))};
}
inline Vec load(const Half* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a.v); }
inline void store(BFloat16* to, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i wide = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}
inline void store(Half* to, Vec a) {
  const __m256i narrow = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}

}  // namespace
}  // namespace lumos
