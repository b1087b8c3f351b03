#include "simd/avx2.h"

#include "matmul/fp32.h"

namespace lumos {

const Fp32Matmul kFp32MatmulAvx2 = {pack_tile, multiply, kPanel};

}  // namespace lumos
