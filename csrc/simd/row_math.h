// The exponential and the reductions of passes over rows of logits. Each file that includes this compiles it for its
// own instruction set.
//
// The functions are plain loops over tiles of kTile floats, which the compiler turns into the vectors of the
// instruction set. Nothing depends on their width, and without FMA all instruction sets give the same bits. Sums run in
// kTile lanes, which also keeps their chains short. No inline function of the standard library may be called on floats:
// the linker would merge the copies of different instruction sets.
#pragma once

#include <cstdint>
#include <limits>

#include "simd/half.h"

namespace lumos {
namespace {

constexpr int64_t kTile = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Returns e^x for x <= 88, within 1.5 units in the last place. It is 0 below -87.3, where subnormals begin, and
/// infinite above 88. NaN stays NaN.
inline float exp_of(float x) {
  constexpr float kLog2E = 0x1.715476p+0f, kToInteger = 0x1.8p23f;
  // The first has 15 bits, so its products are exact.
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  const float bounded = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  const float shifted = bounded * kLog2E + kToInteger;
  const float turns = shifted - kToInteger;
  const float r = (bounded - turns * kLn2High) - turns * kLn2Low;
  const float tail = 0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))));
  const float value = 1.0f + (r + r * r * tail);
  const float scaled = value * float_of((bits_of(shifted) + 127) << 23);
  return x < -87.3f ? 0.0f : (x > 88.0f ? kInfinity : scaled);
}

/// Calls body(kTile values, where they begin, how many of them are valid). The last tile is padded with -inf.
template <class Body>
inline void each_tile(const float* from, int64_t count, Body body) {
  int64_t at = 0;
  for (; at + kTile <= count; at += kTile) body(from + at, at, kTile);
  if (at == count) return;
  float padded[kTile];
  for (int64_t i = 0; i < kTile; ++i) padded[i] = at + i < count ? from[at + i] : -kInfinity;
  body(padded, at, count - at);
}

inline float max_of(const float* from, int64_t count) {
  float lanes[kTile];
  for (float& lane : lanes) lane = -kInfinity;
  each_tile(from, count, [&](const float* tile, int64_t, int64_t) {
    for (int64_t i = 0; i < kTile; ++i) lanes[i] = tile[i] > lanes[i] ? tile[i] : lanes[i];
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

/// Returns what is subtracted from the logits before exponentials: the maximum, or 0 where that is infinite, as
/// torch.logsumexp does.
inline float shift_of(float maximum) { return __builtin_fabsf(maximum) == kInfinity ? 0.0f : maximum; }

}  // namespace
}  // namespace lumos
