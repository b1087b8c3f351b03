#include "simd/base.h"

#include "matmul/fp32.h"

namespace lumos {

const Fp32Matmul kFp32MatmulBase = {pack_tile, multiply, kPanel};

}  // namespace lumos
