// MM-RoPE on the CPU: LayerNorm of q and k over head_dim, then a rotation by three positions, in one pass.
#pragma once

#include <cstdint>

#include "simd/views.h"

namespace lumos {

/// Tokens whose gradients of the norms form one partial sum. The partition depends on nothing else, so that the
/// result does not depend on the number of threads.
inline constexpr int64_t kMMRopeBlock = 64;

/// Position axis (t, h, w) of the rotation pair (i, i + D/2) is kMMRopeAxes[i % 16]; AXES in mm_rope/common.py.
inline constexpr int kMMRopeAxes[16] = {0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2};

/// q or k.
struct MMRopeTensor {
  int64_t heads;
  ConstHeads x;
  ConstHeads grad;      // upstream gradient, backward only
  Heads out;            // the rotated x; backward: the gradient of x
  const float* weight;  // [norm_rows, D], null without a norm
  const float* bias;    // likewise
  int64_t norm_rows;    // row j serves heads j * heads / norm_rows and on
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

/// The kernels of one instruction set. `scratch` is kMMRopeScratch * head_dim floats, one a thread, 64-byte aligned.
struct MMRopeKernels {
  void (*forward)(const MMRopeProblem& problem, int64_t first_token, int64_t last_token, float* scratch);
  /// One block's tokens; writes the partial sums of that block.
  void (*backward)(const MMRopeProblem& problem, int64_t block, int64_t first_token, int64_t last_token,
                   float* scratch);
};
inline constexpr int64_t kMMRopeScratch = 11;

extern const MMRopeKernels kMMRopeBase;
extern const MMRopeKernels kMMRopeAvx2;
extern const MMRopeKernels kMMRopeAvx512;

}  // namespace lumos
