// The same with modelled tiles, for CPUs with AVX512_BF16.
#pragma GCC target("avx512bf16")
#define LUMOS_AVX512_BF16

#include "simd/avx512.h"

#include "frame_attention/kernel.h"
#include "frame_attention/tile_model.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAmxModel = kBf16In<OnTiles<ModelTiles>>;

}  // namespace lumos
