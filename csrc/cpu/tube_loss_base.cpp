#include "tube_loss_kernel.h"

namespace lumos {

const TubeLossKernels kTubeLossBase = {reduce, finish, gradient};

}  // namespace lumos
