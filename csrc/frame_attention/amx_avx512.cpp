// For CPUs with AMX-BF16, all of which have AVX512_BF16 (see frame_attention_bf16_avx512.cpp).
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"
#include "frame_attention/tiles.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAmx = kBf16In<OnTiles<AmxTiles>>;

}  // namespace lumos
