// masked_sample on the CPU draws a class for each row from logits that come block by block. The specification is
// lumos_kernels/masked_sample/reference.py.
//
// A chunk of R rows is multiplied with the K classes in blocks. One visit to a block's logits applies guidance and
// temperature and updates two things: the running sum of exponentials, for the confidence, and the best score, logit +
// Gumbel variate, for the draw. The state that a row carries from block to block is 28 bytes.
#pragma once

#include <cstdint>

namespace lumos {

/// A block of classes of a chunk of R rows.
struct MaskedSampleBlock {
  int64_t classes;      // in this block
  int64_t first;        // its first class, a multiple of 4; the block with first = 0 initialises the state
  float* logits;        // [R, classes], contiguous: the conditional branch's, overwritten by those that are drawn from
  const float* uncond;  // [R, classes], contiguous: the unconditional branch's; null without guidance
  float guidance_scale;
  float temperature;
  const int64_t* keys;  // [R, 2], (seed, counter), contiguous; null for the argmax
};

/// The state of the rows after some blocks. All arrays are [R].
struct MaskedSampleState {
  float* score;    // the best score
  int64_t* id;     // the class with that score
  float* logit;    // the logit of that class
  float* maximum;  // of the logits
  double* sum;     // of exp(logit - shift), where shift is the maximum, or 0 if the maximum is infinite
};

/// The kernels of one instruction set, for rows first .. last - 1.
struct MaskedSampleKernels {
  void (*reduce)(const MaskedSampleBlock& block, const MaskedSampleState& state, int64_t first, int64_t last);
  /// Writes the probability of each row's class to confidence [R], after the last block.
  void (*finish)(const MaskedSampleState& state, float* confidence, int64_t first, int64_t last);
};

extern const MaskedSampleKernels kMaskedSampleBase;
extern const MaskedSampleKernels kMaskedSampleAvx2;
extern const MaskedSampleKernels kMaskedSampleAvx512;

}  // namespace lumos
