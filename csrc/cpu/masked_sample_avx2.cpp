#include "lumos/simd_avx2.h"

#include "masked_sample_kernel.h"
#include "masked_sample_matmul.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleAvx2 = {reduce, finish, pack_tile, logits, kPanel};

}  // namespace lumos
