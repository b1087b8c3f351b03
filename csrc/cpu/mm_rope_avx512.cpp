#include "lumos/simd_avx512.h"

#include "mm_rope_kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeAvx512 = {forward, backward};

}  // namespace lumos
