#include "lumos/simd_avx512.h"

#include "masked_sample_kernel.h"
#include "masked_sample_matmul.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleAvx512 = {reduce, finish, pack_tile, logits, kPanel};

}  // namespace lumos
