#include "lumos/simd_avx512.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx512 = kAnyInFp32;

}  // namespace lumos
