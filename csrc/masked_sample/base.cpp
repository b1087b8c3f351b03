#include "masked_sample/kernel.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleBase = {reduce, finish};

}  // namespace lumos
