// mm_rope on the CPU: LayerNorm of q and k over head_dim, then a rotation by three positions, in one pass.
#pragma once

#include <cstdint>

#include "simd/views.h"

namespace lumos {

/// The number of tokens whose gradients of the norms form one partial sum. The partition depends on nothing else, so
/// that the result does not depend on the number of threads.
inline constexpr int64_t kMMRopeBlock = 64;

/// The rotation pair (i, i + D/2) uses position axis kMMRopeAxes[i % 16] of (t, h, w): AXES in mm_rope/frequencies.py.
inline constexpr int kMMRopeAxes[16] = {0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2};

/// The description of q or of k.
struct MMRopeTensor {
  int64_t heads;
  ConstHeads x;
  ConstHeads grad;      // upstream gradient, backward only
  Heads out;            // the rotated x, or in backward the gradient of x
  const float* weight;  // [norm_rows, D], null without a norm
  const float* bias;    // [norm_rows, D], null without a norm
  int64_t norm_rows;    // row j serves the heads / norm_rows heads from j * heads / norm_rows on
  double* partials;     // [blocks, 2, norm_rows, D]: sums for the gradients of weight and bias, backward only
};

struct MMRopeProblem {
  Dtype dtype;
  int64_t head_dim;
  const int32_t* positions;  // [3, T]
  int64_t axis_stride;
  int64_t token_stride;
  const float* inv_freq;  // [D/2]
  float eps;
  MMRopeTensor tensors[2];
};

/// The kernels of one instruction set. Each thread has its own `scratch`: kMMRopeScratch * head_dim floats, aligned
/// to 64 bytes.
struct MMRopeKernels {
  void (*forward)(const MMRopeProblem& problem, int64_t first_token, int64_t last_token, float* scratch);
  /// Computes the gradients of one block's tokens, and writes the partial sums of that block.
  void (*backward)(const MMRopeProblem& problem, int64_t block, int64_t first_token, int64_t last_token,
                   float* scratch);
};
inline constexpr int64_t kMMRopeScratch = 11;

extern const MMRopeKernels kMMRopeBase;
extern const MMRopeKernels kMMRopeAvx2;
extern const MMRopeKernels kMMRopeAvx512;

}  // namespace lumos
