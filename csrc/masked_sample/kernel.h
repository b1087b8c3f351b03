// The row passes of masked_sample. base.cpp, avx2.cpp and avx512.cpp each compile this file for one instruction set.
//
// The draw takes the class with the highest score. The uniforms u_i come from the row's Philox stream:
//     score_i    = logit_i + G_i,   G_i = -log(E_i),   E_i = -log1p(-u_i)
//     sum        = sum_i exp(logit_i - shift)
//     confidence = exp(logit_class - shift) / sum
//
// A filter rejects most classes without a logarithm. Class i exceeds the best score b only if
//     E_i < exp(logit_i - b) = exp(logit_i - shift) * exp(shift - b),
// and E_i >= u_i. A class with
//     u_i > exp(logit_i - shift) * exp(shift - b)
// therefore cannot win. The first factor is a term of the sum. Of 64,000 classes all but a few dozen are rejected.
//
// The draw is the specification's, bit for bit, on every instruction set. Two things ensure this: the filter never
// rejects a class that would win (see update_bound), and every other class gets its score as the specification computes
// it (see gumbel_of).
//
// reduce reads one block of classes for a range of rows. It takes the maximum of a row's block, then goes through the
// block in tiles of kTile classes, then merges maximum and sum into the row's state as an online softmax does. The
// block's sum has kTile fp32 lanes, and the running sum is a double. finish computes the confidences after the last
// block.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "masked_sample/problem.h"
#include "masked_sample/philox.h"
#include "simd/row_math.h"

namespace lumos {
namespace {

static_assert(kPhiloxColumns == kTile);

/// Returns e^x in double, within a few units in the last place. The result is 0 below -700 and infinite above 700.
/// Every instruction set evaluates this same polynomial.
inline double exp_of(double x) {
  if (!(x >= -700)) return x != x ? x : 0.0;
  if (x > 700) return kInfinity;
  constexpr double kToInteger = 0x1.8p52, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double exponent = (x * 0x1.71547652b82fep+0 + kToInteger) - kToInteger;
  const double r = (x - exponent * kLn2High) - exponent * kLn2Low;
  constexpr double kInverse[] = {1. / 13, 1. / 12, 1. / 11, 1. / 10, 1. / 9, 1. / 8, 1. / 7,
                                 1. / 6,  1. / 5,  1. / 4,  1. / 3,  1. / 2, 1.};
  double value = 1.0;
  for (double inverse : kInverse) value = 1.0 + value * (r * inverse);
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(exponent) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return value * power;
}

/// Converts a random word to the uniform of philox.py, in [2^-33, 1].
inline float uniform_of(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

/// Converts a uniform to the Gumbel variate of philox.py: computed in double, rounded to fp32 once.
inline float gumbel_of(float uniform) {
  return static_cast<float>(-std::log(-std::log1p(-static_cast<double>(uniform))));
}

/// Applies guidance and temperature to a row of logits, in place. Each operation rounds as the specification's does.
inline void apply_guidance_and_temperature(const MaskedSampleBlock& block, int64_t row) {
  float* logits = block.logits + row * block.classes;
  if (block.uncond) {
    const float* uncond = block.uncond + row * block.classes;
    for (int64_t i = 0; i < block.classes; ++i) logits[i] = uncond[i] + block.guidance_scale * (logits[i] - uncond[i]);
  }
  if (block.temperature != 1) {
    for (int64_t i = 0; i < block.classes; ++i) logits[i] = logits[i] / block.temperature;
  }
}

/// The best class so far. The filter rejects a class if its uniform exceeds exp(logit - shift) * bound.
struct Best {
  float score;
  int64_t id;
  float logit;
  float bound = 0;  // a little more than exp(shift - score)

  /// Orders scores as torch.argmax does: the first of equal scores wins, and NaN exceeds every number.
  bool is_exceeded_by(float other) const { return other > score || (other != other && score == score); }

  /// Sets the bound for the present score.
  ///
  /// The filter must never reject a class that exceeds the score. Between the logarithms of what the filter compares
  /// and the score, rounding puts at most 8e-6: exp_of of a difference down to -88 contributes 6e-6, and the Gumbel
  /// variate, which is at most 23, contributes 2e-6. The 1e-4 in `gap` covers that.
  ///
  /// Above a gap of 60 the bound is infinite, so that the filter rejects no class. The fp32 exp_of returns 0 for
  /// everything below e^-87, and that 0 would reject a class that can still win.
  void update_bound(float shift) {
    const double gap = static_cast<double>(shift) - score + 1e-4;
    bound = gap > 60 ? kInfinity : static_cast<float>(exp_of(gap));
  }
};

/// Returns the sum of exp(logit - shift) over a block whose first class is `first`, and updates the best class.
float sum_and_draw(const float* logits, int64_t count, int64_t first, float shift, const PhiloxRow& stream,
                   Best& best) {
  float lanes[kTile] = {};
  best.update_bound(shift);
  each_tile(logits, count, [&](const float* tile, int64_t at, int64_t valid) {
    float exps[kTile], uniforms[kTile];
    uint32_t words[kTile];
    stream.words((first + at) / 4, words);
    for (int64_t i = 0; i < kTile; ++i) exps[i] = exp_of(tile[i] - shift);
    for (int64_t i = 0; i < kTile; ++i) uniforms[i] = uniform_of(words[i]);
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exps[i];
    const float bound = best.bound;
    int any_passes = 0;
    // The filter passes NaN, which is also 0 times an infinite bound: a comparison with NaN is false.
    for (int64_t i = 0; i < kTile; ++i) any_passes |= !(uniforms[i] > exps[i] * bound);
    if (!any_passes) return;
    for (int64_t i = 0; i < valid; ++i) {
      if (uniforms[i] > exps[i] * best.bound) continue;
      const float score = tile[i] + gumbel_of(uniforms[i]);
      if (!best.is_exceeded_by(score)) continue;
      best.score = score;
      best.id = first + at + i;
      best.logit = tile[i];
      best.update_bound(shift);
    }
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// Does the work of sum_and_draw without random numbers. The block's maximum tells whether it holds a better class.
float sum_and_argmax(const float* logits, int64_t count, int64_t first, float maximum, Best& best) {
  float lanes[kTile] = {};
  const float shift = shift_of(maximum);
  each_tile(logits, count, [&](const float* tile, int64_t, int64_t) {
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exp_of(tile[i] - shift);
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  if (best.is_exceeded_by(maximum) || lanes[0] != lanes[0]) {  // a NaN makes the sum NaN, not the maximum
    for (int64_t i = 0; i < count; ++i) {
      if (best.is_exceeded_by(logits[i])) best = {logits[i], first + i, logits[i]};
    }
  }
  return lanes[0];
}

void reduce(const MaskedSampleBlock& block, const MaskedSampleState& state, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    apply_guidance_and_temperature(block, row);
    const float* logits = block.logits + row * block.classes;
    const bool first_block = block.first == 0;
    Best best{-kInfinity, 0, logits[0]};
    if (!first_block) best = {state.score[row], state.id[row], state.logit[row]};
    const float maximum = max_of(logits, block.classes), shift = shift_of(maximum);
    const float sum =
        block.keys ? sum_and_draw(logits, block.classes, block.first, shift, PhiloxRow(block.keys + 2 * row), best)
                   : sum_and_argmax(logits, block.classes, block.first, maximum, best);
    const float old_maximum = first_block ? -kInfinity : state.maximum[row];
    const float new_maximum = maximum > old_maximum ? maximum : old_maximum;
    double total = sum == 0 ? 0.0 : sum * exp_of(static_cast<double>(shift) - shift_of(new_maximum));
    if (!first_block) {
      total += state.sum[row] * exp_of(static_cast<double>(shift_of(old_maximum)) - shift_of(new_maximum));
    }
    state.score[row] = best.score;
    state.id[row] = best.id;
    state.logit[row] = best.logit;
    state.maximum[row] = new_maximum;
    state.sum[row] = total;
  }
}

void finish(const MaskedSampleState& state, float* confidence, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const double shift = shift_of(state.maximum[row]);
    confidence[row] = static_cast<float>(exp_of(state.logit[row] - shift) / state.sum[row]);
  }
}

}  // namespace
}  // namespace lumos
