#include "tube_loss_kernel.h"

namespace lumos {

const TubeLossKernels kTubeLossAvx2 = {reduce, finish, gradient};

}  // namespace lumos
