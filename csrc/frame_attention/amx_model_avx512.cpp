// The kernels of amx_avx512.cpp with tile registers modelled in software, for CPUs with AVX512_BF16.
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"
#include "frame_attention/tile_model.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAmxModel = kBf16Kernels<TileMath<ModelTiles>>;

}  // namespace lumos
