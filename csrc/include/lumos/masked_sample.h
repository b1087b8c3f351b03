// Sampling of masked slots on the CPU: draws a class for each row from logits that come block by block.
//
// A chunk of rows meets the K classes in blocks. A block's logits are guided, tempered and reduced in one visit: the
// running sum of exponentials for the confidence, and the best score, logit + Gumbel variate, for the draw. What a row
// carries from block to block is 28 bytes. The specification is lumos_kernels/masked_sample/reference.py.
#pragma once

#include <cstdint>

#include "lumos/views.h"

namespace lumos {

/// A block of classes of a chunk of R rows.
struct MaskedSampleBlock {
  int64_t classes;       // of this block
  int64_t first;         // its first class, a multiple of 4; the state starts at class 0
  float* logits;         // [R, classes], contiguous: those of the conditional branch, then those drawn from
  const float* uncond;   // [R, classes], contiguous, null without guidance
  float guidance;
  float temperature;
  const int64_t* keys;   // [R, 2], (seed, counter), contiguous; null for the argmax
};

/// What a row knows of the classes so far. All [R].
struct MaskedSampleState {
  float* score;    // the best one
  int64_t* id;     // its class
  float* logit;    // its logit
  float* maximum;  // of the logits
  double* sum;     // of exp(logit - shift), where shift is the maximum, or 0 if that is infinite
};

// ---- matmul: out [R, K] = x weight^T in fp32, a row's result independent of all other rows ----

inline constexpr int64_t kMaskedSampleTileRows = 6;  // rows of a tile of the left factor

/// The right factor. The stride counts elements, columns lie side by side.
struct MaskedSampleWeight {
  Dtype dtype;
  const void* data;
  int64_t rows, columns, stride;
};

/// The kernels of one instruction set.
struct MaskedSampleKernels {
  void (*reduce)(const MaskedSampleBlock& block, const MaskedSampleState& state, int64_t first, int64_t last);
  /// confidence [R] of the rows' classes, when all blocks have passed.
  void (*finish)(const MaskedSampleState& state, float* confidence, int64_t first, int64_t last);
  /// Tile `tile` of x fp32 [rows, columns]: room for ceil(rows / kMaskedSampleTileRows) * tile rows * columns.
  void (*pack_tile)(const float* x, int64_t rows, int64_t columns, int64_t stride, int64_t tile, float* packed);
  /// out [rows, weight.rows], for panels first .. last - 1 of the classes.
  void (*logits)(const float* packed, int64_t rows, const MaskedSampleWeight& weight, float* out, int64_t first,
                 int64_t last);
  int64_t panel;  // classes of a panel
};

extern const MaskedSampleKernels kMaskedSampleBase;
extern const MaskedSampleKernels kMaskedSampleAvx2;
extern const MaskedSampleKernels kMaskedSampleAvx512;

}  // namespace lumos
