#include "simd/avx512.h"

#include "matmul/fp32.h"

namespace lumos {

const Fp32Matmul kFp32MatmulAvx512 = {pack_tile, multiply, kPanel};

}  // namespace lumos
