#include "lumos/simd_avx512.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx512 = {forward_scratch<Fp32>, backward_scratch<Fp32>, forward_any,
                                                 prepare_any,           backward_any,           finish_any};

}  // namespace lumos
