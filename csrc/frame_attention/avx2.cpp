#include "simd/avx2.h"

#include "frame_attention/kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx2 = kFp32Kernels;

}  // namespace lumos
