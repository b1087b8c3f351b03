// Four horizontal sums at once, by a transpose and three additions instead of eight shuffles and eight additions.
#pragma once

#include <emmintrin.h>

namespace lumos {
namespace {

/// Returns the sums of the elements of a, b, c and d. Each is added as (x0 + x2) + (x1 + x3).
inline __m128 sum4(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));  // a02 b02 a13 b13
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

}  // namespace
}  // namespace lumos
