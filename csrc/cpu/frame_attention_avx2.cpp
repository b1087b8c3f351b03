#include "lumos/simd_avx2.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx2 = kAnyInFp32;

}  // namespace lumos
