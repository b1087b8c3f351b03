// Vec, a vector of four floats with SSE2, which every x86-64 CPU has. base.h, avx2.h and avx512.h define the same
// functions of Vec:
//     broadcast, + - *, fma, fms, sum4, and load and store of float, BFloat16 and Half (round to nearest even)
//
// They are in an anonymous namespace. A file compiled for one instruction set includes one of these headers. Without
// the anonymous namespace, the linker would merge its functions with the copies of a file compiled for another set.
#pragma once

#include <emmintrin.h>

#include "simd/half.h"
#include "simd/sum4.h"

namespace lumos {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  __m128 v;
};

inline Vec broadcast(float x) { return {_mm_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm_mul_ps(a.v, b.v)}; }

/// Returns a * b + c, and fms returns a * b - c. SSE2 rounds twice, AVX2 and AVX-512 round once.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }

/// Writes the sums of the lanes of a, b, c and d to to[0 .. 3].
inline void sum4(float* to, Vec a, Vec b, Vec c, Vec d) { _mm_storeu_ps(to, sum4(a.v, b.v, c.v, d.v)); }

inline Vec load(const float* from) { return {_mm_loadu_ps(from)}; }
inline Vec load(const BFloat16* from) {
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return {_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), narrow))};
}
inline Vec load(const Half* from) {
  return {_mm_setr_ps(to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3]))};
}

inline void store(float* to, Vec a) { _mm_storeu_ps(to, a.v); }
inline void store(BFloat16* to, Vec a) {
  const __m128i bits = _mm_castps_si128(a.v);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(a.v, a.v));
  const __m128i nan = _mm_and_si128(is_nan, _mm_set1_epi32(0x7fc00000));
  // SSE2 packs with signed saturation only, so the shift of the upper halves keeps their sign.
  const __m128i wide = _mm_srai_epi32(_mm_or_si128(_mm_andnot_si128(is_nan, rounded), nan), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(wide, wide));
}
inline void store(Half* to, Vec a) {
  float lanes[Vec::kLanes];
  store(lanes, a);
  for (int i = 0; i < Vec::kLanes; ++i) to[i] = to_half(lanes[i]);
}

}  // namespace
}  // namespace lumos
