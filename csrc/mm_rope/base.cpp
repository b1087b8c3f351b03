#include "simd/base.h"

#include "mm_rope/kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeBase = {forward, backward};

}  // namespace lumos
