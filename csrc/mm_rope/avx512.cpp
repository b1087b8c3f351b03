#include "simd/avx512.h"

#include "mm_rope/kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeAvx512 = {forward, backward};

}  // namespace lumos
