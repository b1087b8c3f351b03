// The kernels for CPUs with AMX-BF16. All of these have AVX512_BF16 (see bf16_avx512.cpp).
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"
#include "frame_attention/tiles.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAmx = kBf16Kernels<TileMath<AmxTiles>>;

}  // namespace lumos
