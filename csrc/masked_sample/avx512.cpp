#include "masked_sample/kernel.h"

namespace lumos {

const MaskedSampleKernels kMaskedSampleAvx512 = {reduce, finish};

}  // namespace lumos
