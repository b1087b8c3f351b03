// The kernels of amx_avx512.cpp with tiles in software, for CPUs with AVX512_BF16 (see bf16_avx512.cpp).
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"
#include "frame_attention/tile_model.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAmxModel = kBf16In<OnTiles<ModelTiles>>;

}  // namespace lumos
