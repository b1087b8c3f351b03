#include "simd/base.h"

#include "frame_attention/kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionBase = kFp32Kernels;

}  // namespace lumos
