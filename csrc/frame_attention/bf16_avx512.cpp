// The pragma stands before every include. So all code of this file may use AVX512_BF16 on top of the flags for avx512.
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx512Bf16 = kBf16Kernels<Bf16>;

}  // namespace lumos
