#include "lumos/simd_avx2.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionAvx2 = {forward_scratch<Fp32>, backward_scratch<Fp32>, forward_any,
                                                 prepare_any,           backward_any,           finish_any};

}  // namespace lumos
