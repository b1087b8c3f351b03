#include "tube_masked_loss/kernel.h"

namespace lumos {

const TubeMaskedLossKernels kTubeMaskedLossAvx512 = {reduce, finish, gradient};

}  // namespace lumos
