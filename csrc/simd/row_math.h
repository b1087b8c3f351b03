// Functions of passes over rows of logits. Each file that includes this header compiles it for its instruction set.
//
// They are loops over tiles of kTile floats, which the compiler vectorises. Nothing here depends on the width of the
// vectors, so all sets give the same bits if the compiler forms no FMA. A sum has kTile lanes, which also keeps the
// chain of each lane short. No inline function of the standard library may be called on floats, since the linker would
// merge the copies of different sets.
#pragma once

#include <cstdint>
#include <limits>

#include "simd/half.h"

namespace lumos {
namespace {

constexpr int64_t kTile = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Returns e^x within 1.5 units in the last place for x up to 88, and infinity above. Below -87.3, where subnormals
/// begin, it returns 0. NaN stays NaN.
inline float exp_of(float x) {
  constexpr float kLog2E = 0x1.715476p+0f, kToInteger = 0x1.8p23f;
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // the first has 15 bits for exact products
  const float bounded = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  const float shifted = bounded * kLog2E + kToInteger;
  const float power = shifted - kToInteger;
  const float r = (bounded - power * kLn2High) - power * kLn2Low;
  const float tail = 0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))));
  const float value = 1.0f + (r + r * r * tail);
  const float scaled = value * float_of((bits_of(shifted) + 127) << 23);
  return x < -87.3f ? 0.0f : (x > 88.0f ? kInfinity : scaled);
}

/// Calls body(tile, first, valid) for each tile of kTile values. `first` is the tile's index in `from`, and `valid` is
/// how many of its values come from there. The rest of the last tile is -infinity.
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

/// Returns the value to subtract from the logits of a block: the maximum, or 0 where it is infinite, as torch.logsumexp
/// does.
inline float shift_of(float maximum) { return __builtin_fabsf(maximum) == kInfinity ? 0.0f : maximum; }

}  // namespace
}  // namespace lumos
