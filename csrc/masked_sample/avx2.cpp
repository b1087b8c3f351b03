#include "masked_sample/kernel.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleAvx2 = {reduce, finish};

}  // namespace lumos
