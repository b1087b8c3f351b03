// Tube-masked cross entropy on the CPU: what lies between its matmuls, and the bf16 matmul that leaves fp32.
//
// A chunk of R rows meets the K classes block by block. Each block of logits is reduced to its maximum and to the sum
// of exp(logit - maximum), and those exponentials are kept in the chunk's buffer if gradients are wanted. When all
// blocks have passed, their statistics give the logsumexp, and one factor per row and block turns what was kept into
// the gradient of the logits, in place.
#pragma once

#include <cstdint>

#include "lumos/half.h"
#include "lumos/views.h"

namespace lumos {

/// A block of classes of a chunk of rows. Strides count elements.
struct TubeLossBlock {
  int64_t classes;        // of this block
  int64_t first;          // its first class
  const float* logits;    // [R, classes], contiguous
  const int64_t* targets; // [R], classes of the whole slice
  int64_t block, blocks;  // which block of how many
  Dtype dtype;            // of kept: bf16 or fp32
  void* kept;             // [R, K] with kept_stride, null where no gradients are wanted
  int64_t kept_stride;
};

/// Statistics of a chunk, filled block by block.
struct TubeLossStats {
  float* maximum;        // [R, blocks]
  float* sum;            // [R, blocks], of exp(logit - shift), where shift is the maximum, or 0 if that is infinite
  float* target_logit;   // [R]
  bool* beaten;          // [R], whether the target loses within its own block
};

/// The end of a chunk. loss = row_weight * nll + z_loss * lse^2.
struct TubeLossFinish {
  int64_t classes, block_classes, blocks;
  const int64_t* targets;
  const float* row_weight;  // [R], null for ones
  float z_loss;
  Dtype dtype;
  void* kept;
  int64_t kept_stride;
  float* nll;      // [R]
  float* lse;      // [R]
  bool* correct;   // [R]
};

/// The gradient of the logits where lse is known: softmax * (dnll + dlse) - one_hot * dnll.
struct TubeLossGradient {
  const float* lse;
  const float* dnll;
  const float* dlse;
};

/// The kernels of one instruction set, over rows first .. last - 1 of a chunk.
struct TubeLossKernels {
  void (*reduce)(const TubeLossBlock& block, const TubeLossStats& stats, int64_t first, int64_t last);
  void (*finish)(const TubeLossFinish& finish, const TubeLossStats& stats, int64_t first, int64_t last);
  void (*gradient)(const TubeLossBlock& block, const TubeLossGradient& gradient, int64_t first, int64_t last);
};

extern const TubeLossKernels kTubeLossBase;
extern const TubeLossKernels kTubeLossAvx2;
extern const TubeLossKernels kTubeLossAvx512;

// ---- bf16 matmuls with fp32 results ----

inline constexpr int64_t kTubeLossTileRows = 12;  // rows of a tile of the left factor
inline constexpr int64_t kTubeLossPanel = 32;     // columns of a panel of the right factor
inline constexpr int64_t kTubeLossGroup = 96;     // classes that one call of add_outer serves

/// bf16 [rows, columns]; the stride counts elements, columns lie side by side.
struct TubeLossMatrix {
  const BFloat16* data;
  int64_t rows, columns, stride;
};

/// For CPUs with AVX512_BF16 beside the avx512 set.
struct TubeLossDots {
  /// Tile `tile` of x, for logits: room for ceil(rows / kTubeLossTileRows) * ceil(columns / 2) * kTubeLossTileRows.
  void (*pack_tile)(const TubeLossMatrix& x, int64_t tile, uint32_t* packed);
  /// Panel `panel` of x, for add_outer: room for ceil(columns / kTubeLossPanel) * ceil(rows / 2) * kTubeLossPanel.
  void (*pack_columns)(const TubeLossMatrix& x, int64_t panel, uint32_t* packed);
  /// out [rows, weight.rows] = x weight^T, for panels first .. last - 1 of the classes.
  void (*logits)(const uint32_t* packed, int64_t rows, const TubeLossMatrix& weight, float* out, int64_t first,
                 int64_t last);
  /// dweight [classes, width] += dlogits^T x, for one group of classes; scratch: kTubeLossGroup * ceil(rows / 2).
  void (*add_outer)(const TubeLossMatrix& dlogits, const uint32_t* packed, int64_t width, float* dweight, int64_t group,
                    uint32_t* scratch);
};

extern const TubeLossDots kTubeLossDotsAvx512;

}  // namespace lumos
