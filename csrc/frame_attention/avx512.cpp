#include "simd/avx512.h"

#include "frame_attention/kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx512 = kFp32Kernels;

}  // namespace lumos
