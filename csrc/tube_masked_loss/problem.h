// tube_masked_loss on the CPU: the row passes between its matmuls, which are in matmul/.
//
// A chunk of R rows is multiplied with the K classes block by block. reduce computes the maximum of a block of logits
// and the sum of exp(logit - maximum). If gradients are wanted, it writes those exponentials to the chunk's buffer
// dlogits. After the last block, finish computes the logsumexp from the statistics of the blocks, and multiplies the
// exponentials by one factor for each row and block. The buffer then holds the gradients of the logits.
#pragma once

#include <cstdint>

#include "simd/views.h"

namespace lumos {

/// A block of classes of a chunk of R rows. Strides count elements.
struct TubeMaskedLossBlock {
  int64_t classes;         // number of classes in this block
  int64_t first;           // first class of this block
  const float* logits;     // [R, classes], contiguous
  int64_t slice_classes;   // K, number of classes of the whole slice; only `gradient` reads it
  const int64_t* targets;  // [R], counted from the first class of the slice; rows whose target is no class are skipped
  int64_t block, blocks;   // index of this block, and number of blocks
  Dtype dtype;             // dtype of dlogits, bf16 or fp32
  void* dlogits;           // [R, K] with dlogits_stride, null if no gradients are wanted
  int64_t dlogits_stride;
};

/// Statistics of a chunk. Each call of reduce fills in those of one block.
struct TubeMaskedLossStats {
  float* maximum;       // [R, blocks]
  float* sum;           // [R, blocks], sum of exp(logit - shift); shift is the maximum, or 0 if the maximum is infinite
  float* target_logit;  // [R]
  bool* beaten;         // [R], true if argmax prefers another class of the target's own block to the target
};

/// Arguments of finish. The loss of a row is token_weight * nll + z_loss_weight * lse^2.
struct TubeMaskedLossFinish {
  int64_t classes, block_classes, blocks;
  const int64_t* targets;
  const float* token_weight;  // [R], null for ones
  float z_loss_weight;
  Dtype dtype;
  void* dlogits;
  int64_t dlogits_stride;
  float* nll;     // [R]
  float* lse;     // [R]
  bool* correct;  // [R]
};

/// The logsumexp of each row and the upstream gradients of nll and lse, all [R]. The gradient of the logits is
///     softmax * (dnll + dlse) - one_hot * dnll,   softmax = exp(logit - lse).
struct TubeMaskedLossGradient {
  const float* lse;
  const float* dnll;
  const float* dlse;
};

/// The kernels of one instruction set, for rows first .. last - 1 of a chunk.
struct TubeMaskedLossKernels {
  /// Computes the statistics of a block. Writes its exponentials to dlogits unless that is null.
  void (*reduce)(const TubeMaskedLossBlock& block, const TubeMaskedLossStats& stats, int64_t first, int64_t last);
  /// Computes nll, lse and correct, and turns the exponentials in dlogits into gradients, after the last block.
  void (*finish)(const TubeMaskedLossFinish& finish, const TubeMaskedLossStats& stats, int64_t first, int64_t last);
  /// Writes the gradient of a block's logits to dlogits.
  void (*gradient)(const TubeMaskedLossBlock& block, const TubeMaskedLossGradient& gradient, int64_t first,
                   int64_t last);
};

extern const TubeMaskedLossKernels kTubeMaskedLossBase;
extern const TubeMaskedLossKernels kTubeMaskedLossAvx2;
extern const TubeMaskedLossKernels kTubeMaskedLossAvx512;

}  // namespace lumos
