// The row passes of the tube-masked loss, written once; each tube_masked_loss_<isa>.cpp compiles this for its instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd/half.h"
#include "tube_masked_loss/problem.h"
#include "simd/row_math.h"

namespace lumos {
namespace {

inline void write(float* to, float x) { *to = x; }
inline void write(BFloat16* to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
inline float read(float x) { return x; }
inline float read(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
inline void store_tile(T* to, const float* values, int64_t count) {
  if (count == kTile) {
    for (int64_t i = 0; i < kTile; ++i) write(to + i, values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) write(to + i, values[i]);
  }
}

/// Sum of exp(x - shift). kept is null, or takes the exponentials.
template <class T>
float sum_of_exp(const float* from, int64_t count, float shift, T* kept) {
  float lanes[kTile] = {};
  each_tile(from, count, [&](const float* tile, int64_t at, int64_t valid) {
    float exps[kTile];
    for (int64_t i = 0; i < kTile; ++i) exps[i] = exp_of(tile[i] - shift);
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exps[i];
    if (kept) store_tile(kept + at, exps, valid);
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// Whether torch.argmax would prefer another class of the block: the first of equals wins, and NaN beats numbers.
bool beaten_in_block(const float* logits, int64_t count, int64_t target) {
  const float own = logits[target];
  int before = 0, after = 0;
  if (own != own) {
    for (int64_t i = 0; i < target; ++i) before |= logits[i] != logits[i];
    return before;
  }
  for (int64_t i = 0; i < target; ++i) before |= !(logits[i] < own);
  for (int64_t i = target + 1; i < count; ++i) after |= !(logits[i] <= own);
  return before | after;
}

template <class T>
void reduce_rows(const TubeMaskedLossBlock& block, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* logits = block.logits + row * block.classes;
    T* kept = block.kept ? static_cast<T*>(block.kept) + row * block.kept_stride + block.first : nullptr;
    const float maximum = max_of(logits, block.classes);
    const int64_t at = row * block.blocks + block.block;
    stats.maximum[at] = maximum;
    stats.sum[at] = sum_of_exp(logits, block.classes, shift_of(maximum), kept);
    const int64_t target = block.targets[row] - block.first;
    if (target >= 0 && target < block.classes) {
      stats.target_logit[row] = logits[target];
      stats.beaten[row] = beaten_in_block(logits, block.classes, target);
    }
  }
}

/// The statistics of the blocks of one row, put together in double.
struct RowOfBlocks {
  const float* maximum;
  const float* sum;
  int64_t blocks;

  double logsumexp() const {
    float highest = -kInfinity;
    for (int64_t b = 0; b < blocks; ++b) highest = maximum[b] > highest ? maximum[b] : highest;
    const double shift = shift_of(highest);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (sum[b] != 0) total += sum[b] * std::exp(shift_of(maximum[b]) - shift);
    }
    return shift + std::log(total);
  }

  bool beats(int64_t block, float own, bool earlier) const {
    const bool has_nan = sum[block] != sum[block];
    if (own != own) return earlier && has_nan;
    return has_nan || !(earlier ? maximum[block] < own : maximum[block] <= own);
  }
};

template <class T>
void scale(T* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) write(values + i, read(values[i]) * factor);
}

template <class T>
void finish_rows(const TubeMaskedLossFinish& job, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const RowOfBlocks parts{stats.maximum + row * job.blocks, stats.sum + row * job.blocks, job.blocks};
    const double lse = parts.logsumexp();
    const float own = stats.target_logit[row];
    const int64_t target = job.targets[row];
    bool correct = !stats.beaten[row];
    for (int64_t b = 0; b < job.blocks; ++b) {
      if (b != target / job.block_classes) correct &= !parts.beats(b, own, b < target / job.block_classes);
    }
    job.nll[row] = static_cast<float>(lse - own);
    job.lse[row] = static_cast<float>(lse);
    job.correct[row] = correct;
    if (!job.kept) continue;
    const double weight = job.row_weight ? job.row_weight[row] : 1.0;
    const double factor = weight + 2.0 * job.z_loss_weight * lse;
    T* kept = static_cast<T*>(job.kept) + row * job.kept_stride;
    for (int64_t b = 0; b < job.blocks; ++b) {
      const int64_t begin = b * job.block_classes;
      const int64_t count = job.classes - begin < job.block_classes ? job.classes - begin : job.block_classes;
      scale(kept + begin, count, static_cast<float>(std::exp(shift_of(parts.maximum[b]) - lse) * factor));
    }
    write(kept + target, static_cast<float>(std::exp(own - lse) * factor - weight));
  }
}

template <class T>
void gradient_rows(const TubeMaskedLossBlock& block, const TubeMaskedLossGradient& upstream, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* logits = block.logits + row * block.classes;
    T* kept = static_cast<T*>(block.kept) + row * block.kept_stride + block.first;
    const float lse = upstream.lse[row], factor = upstream.dnll[row] + upstream.dlse[row];
    each_tile(logits, block.classes, [&](const float* tile, int64_t at, int64_t valid) {
      float gradients[kTile];
      for (int64_t i = 0; i < kTile; ++i) gradients[i] = exp_of(tile[i] - lse) * factor;
      store_tile(kept + at, gradients, valid);
    });
    const int64_t target = block.targets[row] - block.first;
    if (target >= 0 && target < block.classes) {
      write(kept + target, exp_of(logits[target] - lse) * factor - upstream.dnll[row]);
    }
  }
}

void reduce(const TubeMaskedLossBlock& block, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  const bool narrow = block.dtype == Dtype::bf16;
  (narrow ? reduce_rows<BFloat16> : reduce_rows<float>)(block, stats, first, last);
}

void finish(const TubeMaskedLossFinish& job, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  const bool narrow = job.dtype == Dtype::bf16;
  (narrow ? finish_rows<BFloat16> : finish_rows<float>)(job, stats, first, last);
}

void gradient(const TubeMaskedLossBlock& block, const TubeMaskedLossGradient& upstream, int64_t first, int64_t last) {
  const bool narrow = block.dtype == Dtype::bf16;
  (narrow ? gradient_rows<BFloat16> : gradient_rows<float>)(block, upstream, first, last);
}

}  // namespace
}  // namespace lumos
