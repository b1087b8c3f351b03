// masked_sample on the CPU draws a class for each row from logits that come block by block. The specification is
// lumos_kernels/masked_sample/reference.py.
//
// A chunk of R rows is multiplied with the K classes in blocks. reduce applies guidance and temperature to a block of
// logits, then updates the running maximum and the running sum of exponentials for the confidence, and the best score
// (logit + Gumbel variate) for the draw. finish computes the confidence after the last block. The state that a row
// carries from block to block is 28 bytes.
#pragma once

#include <cstdint>

namespace lumos {

/// A block of classes of a chunk of R rows.
struct MaskedSampleBlock {
  int64_t classes;      // number of classes in this block
  int64_t first;        // first class of this block, a multiple of 4; the block with first = 0 initialises the state
  float* logits;        // [R, classes], contiguous, conditional; reduce overwrites them with those that it draws from
  const float* uncond;  // [R, classes], contiguous, unconditional; null without guidance
  float guidance_scale;
  float temperature;
  const int64_t* keys;  // [R, 2], (seed, counter), contiguous; null for the argmax
};

/// The state of the rows after the blocks so far. All arrays are [R].
struct MaskedSampleState {
  float* score;    // best score
  int64_t* id;     // class with the best score
  float* logit;    // logit of that class
  float* maximum;  // running maximum of the logits
  double* sum;     // running sum of exp(logit - shift); shift is the maximum, or 0 if the maximum is infinite
};

/// The kernels of one instruction set, for rows first .. last - 1.
struct MaskedSampleKernels {
  /// Draws from a block of classes and updates the state.
  void (*reduce)(const MaskedSampleBlock& block, const MaskedSampleState& state, int64_t first, int64_t last);
  /// Writes the probability of each row's class to confidence [R], after the last block.
  void (*finish)(const MaskedSampleState& state, float* confidence, int64_t first, int64_t last);
};

extern const MaskedSampleKernels kMaskedSampleBase;
extern const MaskedSampleKernels kMaskedSampleAvx2;
extern const MaskedSampleKernels kMaskedSampleAvx512;

}  // namespace lumos
