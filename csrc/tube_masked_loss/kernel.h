// The row passes of tube_masked_loss. base.cpp, avx2.cpp and avx512.cpp each compile this file for one instruction set.
//
// Block b of a row's logits has maximum m_b and sum s_b. With M the largest of the m_b,
//     s_b = sum_i exp(logit_i - m_b),   lse = M + log(sum_b s_b * exp(m_b - M)),   nll = lse - logit_target
//     loss = weight * nll + z * lse^2
//     dlogit_i = exp(logit_i - m_b) * exp(m_b - lse) * (weight + 2 z lse) - weight * (i = target)
// If a maximum is infinite, 0 takes its place as the shift.
//
// reduce goes through a block in tiles of kTile logits, whose exponentials are summed in kTile fp32 lanes. finish
// combines the blocks of a row in double. gradient recomputes the exponentials, where lse and the upstream gradients
// are given.
//
// A target outside 0 .. K - 1 marks a row to skip: its nll, lse and gradients are 0, and it is not correct. No kernel
// reads or writes at the index of such a target.
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

/// Returns the sum of exp(x - shift). Writes the exponentials to exps_out unless that is null.
template <class T>
float sum_of_exp(const float* from, int64_t count, float shift, T* exps_out) {
  float lanes[kTile] = {};
  each_tile(from, count, [&](const float* tile, int64_t at, int64_t valid) {
    float exps[kTile];
    for (int64_t i = 0; i < kTile; ++i) exps[i] = exp_of(tile[i] - shift);
    for (int64_t i = 0; i < kTile; ++i) lanes[i] += exps[i];
    if (exps_out) store_tile(exps_out + at, exps, valid);
  });
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// Returns true if torch.argmax prefers another class of the block to the target. The first of equal logits wins, and
/// NaN exceeds every number.
bool beaten_in_block(const float* logits, int64_t count, int64_t target) {
  const float target_logit = logits[target];
  int before = 0, after = 0;
  if (target_logit != target_logit) {
    for (int64_t i = 0; i < target; ++i) before |= logits[i] != logits[i];
    return before;
  }
  for (int64_t i = 0; i < target; ++i) before |= !(logits[i] < target_logit);
  for (int64_t i = target + 1; i < count; ++i) after |= !(logits[i] <= target_logit);
  return before | after;
}

template <class T>
void reduce_rows(const TubeMaskedLossBlock& block, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* logits = block.logits + row * block.classes;
    T* dlogits = block.dlogits ? static_cast<T*>(block.dlogits) + row * block.dlogits_stride + block.first : nullptr;
    const float maximum = max_of(logits, block.classes);
    const int64_t at = row * block.blocks + block.block;
    stats.maximum[at] = maximum;
    stats.sum[at] = sum_of_exp(logits, block.classes, shift_of(maximum), dlogits);
    const int64_t target = block.targets[row];
    if (target >= block.first && target < block.first + block.classes) {
      stats.target_logit[row] = logits[target - block.first];
      stats.beaten[row] = beaten_in_block(logits, block.classes, target - block.first);
    }
  }
}

/// The statistics of the blocks of one row.
struct RowStats {
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

  /// Returns true if torch.argmax prefers a class of the block to the target. An `earlier` block precedes the target's,
  /// so that it wins ties.
  bool beats(int64_t block, float target_logit, bool earlier) const {
    const bool has_nan = sum[block] != sum[block];
    if (target_logit != target_logit) return earlier && has_nan;
    return has_nan || !(earlier ? maximum[block] < target_logit : maximum[block] <= target_logit);
  }
};

inline bool is_class(int64_t target, int64_t classes) { return target >= 0 && target < classes; }

template <class T>
void clear(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) write(values + i, 0.0f);
}

template <class T>
void scale(T* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) write(values + i, read(values[i]) * factor);
}

template <class T>
void finish_rows(const TubeMaskedLossFinish& job, const TubeMaskedLossStats& stats, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t target = job.targets[row];
    T* dlogits = job.dlogits ? static_cast<T*>(job.dlogits) + row * job.dlogits_stride : nullptr;
    if (!is_class(target, job.classes)) {
      job.nll[row] = job.lse[row] = 0;
      job.correct[row] = false;
      if (dlogits) clear(dlogits, job.classes);
      continue;
    }
    const RowStats parts{stats.maximum + row * job.blocks, stats.sum + row * job.blocks, job.blocks};
    const double lse = parts.logsumexp();
    const float target_logit = stats.target_logit[row];
    bool correct = !stats.beaten[row];
    for (int64_t b = 0; b < job.blocks; ++b) {
      if (b != target / job.block_classes) correct &= !parts.beats(b, target_logit, b < target / job.block_classes);
    }
    job.nll[row] = static_cast<float>(lse - target_logit);
    job.lse[row] = static_cast<float>(lse);
    job.correct[row] = correct;
    if (!dlogits) continue;
    const double weight = job.token_weight ? job.token_weight[row] : 1.0;
    const double factor = weight + 2.0 * job.z_loss_weight * lse;
    for (int64_t b = 0; b < job.blocks; ++b) {
      const int64_t begin = b * job.block_classes;
      const int64_t count = job.classes - begin < job.block_classes ? job.classes - begin : job.block_classes;
      scale(dlogits + begin, count, static_cast<float>(std::exp(shift_of(parts.maximum[b]) - lse) * factor));
    }
    write(dlogits + target, static_cast<float>(std::exp(target_logit - lse) * factor - weight));
  }
}

template <class T>
void gradient_rows(const TubeMaskedLossBlock& block, const TubeMaskedLossGradient& upstream, int64_t first,
                   int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* logits = block.logits + row * block.classes;
    T* dlogits = static_cast<T*>(block.dlogits) + row * block.dlogits_stride + block.first;
    if (!is_class(block.targets[row], block.slice_classes)) {
      clear(dlogits, block.classes);
      continue;
    }
    const float lse = upstream.lse[row], factor = upstream.dnll[row] + upstream.dlse[row];
    each_tile(logits, block.classes, [&](const float* tile, int64_t at, int64_t valid) {
      float gradients[kTile];
      for (int64_t i = 0; i < kTile; ++i) gradients[i] = exp_of(tile[i] - lse) * factor;
      store_tile(dlogits + at, gradients, valid);
    });
    const int64_t target = block.targets[row] - block.first;
    if (target >= 0 && target < block.classes) {
      write(dlogits + target, exp_of(logits[target] - lse) * factor - upstream.dnll[row]);
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
