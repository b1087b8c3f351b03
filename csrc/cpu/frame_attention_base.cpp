#include "lumos/simd_base.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionBase = kAnyInFp32;

}  // namespace lumos
