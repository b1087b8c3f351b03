// The row pass of masked_sample, written once; each masked_sample_<isa>.cpp compiles this for its instruction set.
//
// Of 64,000 classes all but a few dozen lose the draw without a logarithm. Class i beats the best score b only if
// E_i < exp(logit_i - b), and E_i = -log1p(-u_i) >= u_i: where u_i > exp(logit_i - shift) * exp(shift - b), it has lost.
// The first factor is what the sum needs anyway. Whoever is left gets the score as the specification computes it, so
// the draw is the specification's, bit for bit, and the same on every instruction set.
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

/// e^x in double, within a few units in the last place; 0 below -700, infinite above 700. One polynomial for all sets.
inline double exp_of(double x) {
  if (!(x >= -700)) return x != x ? x : 0.0;
  if (x > 700) return kInfinity;
  constexpr double kToInteger = 0x1.8p52, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double turns = (x * 0x1.71547652b82fep+0 + kToInteger) - kToInteger;
  const double r = (x - turns * kLn2High) - turns * kLn2Low;
  constexpr double kInverse[] = {1. / 13, 1. / 12, 1. / 11, 1. / 10, 1. / 9, 1. / 8, 1. / 7,
                                 1. / 6,  1. / 5,  1. / 4,  1. / 3,  1. / 2, 1.};
  double value = 1.0;
  for (double inverse : kInverse) value = 1.0 + value * (r * inverse);
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(turns) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return value * power;
}

/// philox.py's uniform of a word.
inline float uniform_of(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

/// philox.py's Gumbel variate of a uniform.
inline float gumbel_of(float uniform) {
  return static_cast<float>(-std::log(-std::log1p(-static_cast<double>(uniform))));
}

/// Guidance and temperature in place, each operation rounded as the specification rounds it.
inline void temper(const MaskedSampleBlock& block, int64_t row) {
  float* logits = block.logits + row * block.classes;
  if (block.uncond) {
    const float* uncond = block.uncond + row * block.classes;
    for (int64_t i = 0; i < block.classes; ++i) logits[i] = uncond[i] + block.guidance_scale * (logits[i] - uncond[i]);
  }
  if (block.temperature != 1) {
    for (int64_t i = 0; i < block.classes; ++i) logits[i] = logits[i] / block.temperature;
  }
}

/// The best score so far, and the bar that another class's uniform must not exceed.
struct Best {
  float score;
  int64_t id;
  float logit;
  float bar = 0;  // exp(shift - score), a little more

  /// As torch.argmax: the first of equals wins, and NaN beats numbers.
  bool loses_to(float other) const { return other > score || (other != other && score == score); }

  /// Rounding puts at most 8e-6 between the logarithms of what the filter compares and the score (exp_of of a
  /// difference down to -88: 6e-6; the Gumbel variate, at most 23: 2e-6); 1e-4 covers that. Above e^60 nobody is
  /// turned away: the exponential of a logit far below the shift is 0, which stands for anything below e^-87.
  void raise_bar(float shift) {
    const double gap = static_cast<double>(shift) - score + 1e-4;
    bar = gap > 60 ? kInfinity : static_cast<float>(exp_of(gap));
  }
};

/// Returns the sum of exp(logit - shift), and lets the classes of the block compete.
float race(const float* logits, int64_t count, int64_t first, float shift, const PhiloxRow& stream, Best& best) {
  float lanes[kTile] = {};
  best.raise_bar(shift);
  each_tile(logits, count, [&](const float* tile, int64_t at, int64_t valid) {
    float exps[kTile], uniforms[kTile];
    uint32_t words[kTile];
    stream.words((first + at) / 4, words);
    for (int64_t i = 0; i < kTile; ++i) exps[i] = exp_of(tile[i] - shift);
    for (int64_t i = 0; i < kTile; ++i) uniforms[i] = uniform_of(words[i]);
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exps[i];
    const float bar = best.bar;
    int open = 0;
    for (int64_t i = 0; i < kTile; ++i) open |= !(uniforms[i] > exps[i] * bar);  // NaN stays in
    if (!open) return;
    for (int64_t i = 0; i < valid; ++i) {
      if (uniforms[i] > exps[i] * best.bar) continue;
      const float score = tile[i] + gumbel_of(uniforms[i]);
      if (!best.loses_to(score)) continue;
      best.score = score;
      best.id = first + at + i;
      best.logit = tile[i];
      best.raise_bar(shift);
    }
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// The same without random numbers, where the maximum is known.
float settle(const float* logits, int64_t count, int64_t first, float maximum, Best& best) {
  float lanes[kTile] = {};
  const float shift = shift_of(maximum);
  each_tile(logits, count, [&](const float* tile, int64_t, int64_t) {
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exp_of(tile[i] - shift);
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  if (best.loses_to(maximum) || lanes[0] != lanes[0]) {
    for (int64_t i = 0; i < count; ++i) {
      if (best.loses_to(logits[i])) best = {logits[i], first + i, logits[i]};
    }
  }
  return lanes[0];
}

void reduce(const MaskedSampleBlock& block, const MaskedSampleState& state, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    temper(block, row);
    const float* logits = block.logits + row * block.classes;
    const bool start = block.first == 0;
    Best best{-kInfinity, 0, logits[0]};
    if (!start) best = {state.score[row], state.id[row], state.logit[row]};
    const float maximum = max_of(logits, block.classes), shift = shift_of(maximum);
    const float sum = block.keys ? race(logits, block.classes, block.first, shift, PhiloxRow(block.keys + 2 * row), best)
                                 : settle(logits, block.classes, block.first, maximum, best);
    const float before = start ? -kInfinity : state.maximum[row];
    const float highest = maximum > before ? maximum : before;
    double total = sum == 0 ? 0.0 : sum * exp_of(static_cast<double>(shift) - shift_of(highest));
    if (!start) total += state.sum[row] * exp_of(static_cast<double>(shift_of(before)) - shift_of(highest));
    state.score[row] = best.score;
    state.id[row] = best.id;
    state.logit[row] = best.logit;
    state.maximum[row] = highest;
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
