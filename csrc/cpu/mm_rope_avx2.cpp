#include "lumos/simd_avx2.h"

#include "mm_rope_kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeAvx2 = {forward, backward};

}  // namespace lumos
