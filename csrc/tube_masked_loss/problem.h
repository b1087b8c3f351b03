// tube_masked_loss on the CPU: the row passes between its matmuls, which are in matmul/.
//
// A chunk of R rows is multiplied with the K classes block by block. reduce turns each block of logits into its maximum
// and the sum of exp(logit - maximum), and keeps those exponentials in the chunk's buffer if gradients are wanted.
// After the last block, finish computes the logsumexp from the statistics of the blocks; one factor for each row and
// block turns the kept exponentials into the gradient of the logits, in place.
#pragma once

#include <cstdint>

#include "simd/views.h"

namespace lumos {

/// A block of classes of a chunk of R rows. Strides count elements.
struct TubeMaskedLossBlock {
  int64_t classes;         // in this block
  int64_t first;           // its first class
  const float* logits;     // [R, classes], contiguous
  const int64_t* targets;  // [R], counted from the first class of the slice
  int64_t block, blocks;   // the index of this block, and the number of blocks
  Dtype dtype;             // of kept: bf16 or fp32
  void* kept;              // [R, K] with kept_stride, null where no gradients are wanted
  int64_t kept_stride;
};

/// Statistics of a chunk, filled block by block.
struct TubeMaskedLossStats {
  float* maximum;       // [R, blocks]
  float* sum;           // [R, blocks], of exp(logit - shift); shift is the maximum, or 0 if the maximum is infinite
  float* target_logit;  // [R]
  bool* beaten;         // [R], whether another class of the target's own block beats the target
};

/// Arguments of finish. loss = row_weight * nll + z_loss_weight * lse^2.
struct TubeMaskedLossFinish {
  int64_t classes, block_classes, blocks;
  const int64_t* targets;
  const float* row_weight;  // [R], null for ones
  float z_loss_weight;
  Dtype dtype;
  void* kept;
  int64_t kept_stride;
  float* nll;     // [R]
  float* lse;     // [R]
  bool* correct;  // [R]
};

/// The upstream gradients. Where lse is known, the gradient of the logits is
///     softmax * (dnll + dlse) - one_hot * dnll.
struct TubeMaskedLossGradient {
  const float* lse;
  const float* dnll;
  const float* dlse;
};

/// The kernels of one instruction set, for rows first .. last - 1 of a chunk.
struct TubeMaskedLossKernels {
  void (*reduce)(const TubeMaskedLossBlock& block, const TubeMaskedLossStats& stats, int64_t first, int64_t last);
  void (*finish)(const TubeMaskedLossFinish& finish, const TubeMaskedLossStats& stats, int64_t first, int64_t last);
  void (*gradient)(const TubeMaskedLossBlock& block, const TubeMaskedLossGradient& gradient, int64_t first,
                   int64_t last);
};

extern const TubeMaskedLossKernels kTubeMaskedLossBase;
extern const TubeMaskedLossKernels kTubeMaskedLossAvx2;
extern const TubeMaskedLossKernels kTubeMaskedLossAvx512;

}  // namespace lumos
