#include "tube_masked_loss/kernel.h"

namespace lumos {

const TubeMaskedLossKernels kTubeMaskedLossBase = {reduce, finish, gradient};

}  // namespace lumos
