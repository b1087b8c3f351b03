#include "lumos/simd_base.h"

#include "frame_attention_kernel.h"

namespace lumos {

const FrameAttentionKernels kFrameAttentionBase = {forward_scratch<Fp32>, backward_scratch<Fp32>, forward_any,
                                                 prepare_any,           backward_any,           finish_any};

}  // namespace lumos
