#include "lumos/simd_base.h"

#include "mm_rope_kernel.h"

namespace lumos {

const MMRopeKernels kMMRopeBase = {forward, backward};

}  // namespace lumos
