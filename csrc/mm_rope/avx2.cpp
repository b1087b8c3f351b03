#include "simd/avx2.h"

#include "mm_rope/kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeAvx2 = {forward, backward};

}  // namespace lumos
