#include "lumos/simd_base.h"

#include "masked_sample_kernel.h"
#include "masked_sample_matmul.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleBase = {reduce, finish, pack_tile, logits, kPanel};

}  // namespace lumos
