#include "tube_loss_kernel.h"

namespace lumos {

const TubeLossKernels kTubeLossAvx512 = {reduce, finish, gradient};

}  // namespace lumos
