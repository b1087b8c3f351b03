// More functions of Vec. One of base.h, avx2.h and avx512.h is included before this header:
//     maximum, minimum, max_lane, select_between, lane_numbers, round_to_integer, exp2, exp2_product and transpose
// The comments of the AVX-512 functions hold for all three sets.
#pragma once

#include <cstdint>

namespace lumos {
namespace {

constexpr int kLanes = Vec::kLanes;

#if defined(__AVX512F__)

/// A lane is b where a or b is NaN. This holds for minimum, too.
inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

/// Returns x where low <= index < high, else other.
inline Vec select_between(Vec low, Vec index, Vec high, Vec x, Vec other) {
  const __mmask16 from = _mm512_cmp_ps_mask(low.v, index.v, _CMP_LE_OQ);
  return {_mm512_mask_mov_ps(other.v, _mm512_mask_cmp_ps_mask(from, index.v, high.v, _CMP_LT_OQ), x.v)};
}

inline Vec round_to_integer(Vec x) { return {_mm512_roundscale_ps(x.v, 0)}; }
/// Returns x 2^power for an integer power. The third argument is for the other two sets: they add `power` to the
/// exponent bits of x, which fails below 2^-126, and return 0 where it is below -126.
inline Vec times_power_of_2(Vec x, Vec power, Vec) { return {_mm512_scalef_ps(x.v, power.v)}; }

/// Sets to[j][i] = from[i][j] for a square of kLanes x kLanes.
inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 128-bit lane n of r[i + c] becomes column 4 n + c of rows i .. i + 3
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 ab_even = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 cd_odd = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(ab_even, cd_even, 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd));
    _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd));
  }
}

#elif defined(__AVX2__)

inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float max_lane(Vec a) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Vec select_between(Vec low, Vec index, Vec high, Vec x, Vec other) {
  const __m256 from = _mm256_cmp_ps(low.v, index.v, _CMP_LE_OQ), until = _mm256_cmp_ps(index.v, high.v, _CMP_LT_OQ);
  return {_mm256_blendv_ps(other.v, x.v, _mm256_and_ps(from, until))};
}

inline Vec round_to_integer(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power_of_2(Vec x, Vec power, Vec exponent) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(power.v), 23);
  const __m256 product = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), shifted));
  return {_mm256_andnot_ps(_mm256_cmp_ps(exponent.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), product)};
}

inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * to_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(to + (4 + c) * to_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}

#else

inline Vec maximum(Vec a, Vec b) { return {_mm_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm_min_ps(a.v, b.v)}; }
inline float max_lane(Vec a) {
  const __m128 two = _mm_max_ps(a.v, _mm_movehl_ps(a.v, a.v));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline Vec select_between(Vec low, Vec index, Vec high, Vec x, Vec other) {
  const __m128 inside = _mm_and_ps(_mm_cmple_ps(low.v, index.v), _mm_cmplt_ps(index.v, high.v));
  return {_mm_or_ps(_mm_and_ps(inside, x.v), _mm_andnot_ps(inside, other.v))};
}

inline Vec round_to_integer(Vec x) { return {_mm_cvtepi32_ps(_mm_cvtps_epi32(x.v))}; }
inline Vec times_power_of_2(Vec x, Vec power, Vec exponent) {
  const __m128i shifted = _mm_slli_epi32(_mm_cvtps_epi32(power.v), 23);
  const __m128 product = _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(x.v), shifted));
  return {_mm_andnot_ps(_mm_cmplt_ps(exponent.v, _mm_set1_ps(-126.0f)), product)};
}

inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(from + i * from_stride);
  _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, r[i]);
}

#endif

/// Sets to[j][i] = from[i][j]. rows and columns are multiples of kLanes. The elements may be any 32-bit words.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
}

/// Returns 0, 1, 2 and so on.
inline Vec lane_numbers() {
  alignas(64) static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}

/// Returns 2^f for |f| <= 1/2, exactly 1 at 0, by a polynomial of degree kDegree. Its relative error before rounding is
/// 1e-4 for degree 3, 9e-8 for 5 and 2e-9 for 6. The coefficients minimise the largest relative error with the constant
/// term held at 1.
template <int kDegree>
inline Vec exp2_fraction(Vec f) {
  static_assert(kDegree == 3 || kDegree == 5 || kDegree == 6);
  Vec y;
  if constexpr (kDegree == 3) {
    y = fma(broadcast(0x1.c2a218p-5f), f, broadcast(0x1.f00c4cp-3f));
    y = fma(y, f, broadcast(0x1.62f5fap-1f));
  } else if constexpr (kDegree == 5) {
    y = fma(broadcast(0x1.5bba14p-10f), f, broadcast(0x1.3cea88p-7f));
    y = fma(y, f, broadcast(0x1.c6b752p-5f));
    y = fma(y, f, broadcast(0x1.ebf9bcp-3f));
    y = fma(y, f, broadcast(0x1.62e42ap-1f));
  } else {
    y = fma(broadcast(0x1.41fbbcp-13f), f, broadcast(0x1.5f3e52p-10f));
    y = fma(y, f, broadcast(0x1.3b2d4cp-7f));
    y = fma(y, f, broadcast(0x1.c6aee8p-5f));
    y = fma(y, f, broadcast(0x1.ebfbdcp-3f));
    y = fma(y, f, broadcast(0x1.62e430p-1f));
  }
  return fma(y, f, broadcast(1.0f));
}

/// Returns 2^x for x <= 0, exactly 1 at 0. Below 2^-126 the result is a subnormal with AVX-512, else 0.
template <int kDegree>
inline Vec exp2(Vec x) {
  const Vec power = round_to_integer(x);
  return times_power_of_2(exp2_fraction<kDegree>(x - power), power, x);
}

/// Returns 2^(a b - reference) for an integer reference, up to 2^127. Below 2^-126 the result is a subnormal with
/// AVX-512, else 0. Above it, another reference multiplies the result by a power of 2 exactly.
///
/// With kLarge, a b may be 2^24 or more, where adjacent floats differ by more than 1. Then a b - power can exceed 1, so
/// it is clamped to [-1, 1].
template <int kDegree, bool kLarge>
inline Vec exp2_product(Vec a, Vec b, Vec reference) {
  const Vec power = round_to_integer(a * b), rest = power - reference;
  Vec fraction = fms(a, b, power);
  if constexpr (kLarge) fraction = maximum(broadcast(-1.0f), minimum(broadcast(1.0f), fraction));
  return times_power_of_2(exp2_fraction<kDegree>(fraction), rest, rest - broadcast(0.5f));
}

}  // namespace
}  // namespace lumos
