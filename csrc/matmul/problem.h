// Matmuls with fp32 sums and fp32 results, which the loss and sampling share: bf16 x bf16 where the CPU multiplies bf16
// (AVX512_BF16), and fp32 x any dtype on every CPU.
//
// `multiply` works on packed factors. The left factor is packed once into tiles of rows. Panels of the right factor are
// packed while the product is computed. Each thread computes the panels, that is the columns of the result, that it is
// given, so that no two threads write one element.
#pragma once

#include <cstdint>

#include "simd/half.h"
#include "simd/views.h"

namespace lumos {

inline constexpr int64_t kBf16TileRows = 12;  // rows of a tile of the left factor
inline constexpr int64_t kBf16Panel = 32;     // columns of a panel of the right factor
inline constexpr int64_t kBf16Group = 96;     // rows of the result that one call of add_outer computes

/// A bf16 matrix [rows, columns]. The stride of the rows counts elements. The stride of the columns is 1.
struct Bf16Matrix {
  const BFloat16* data;
  int64_t rows, columns, stride;
};

/// The functions for CPUs with AVX512_BF16 beside the avx512 set. Sizes of packed buffers and scratch count uint32.
struct Bf16Matmul {
  /// Packs tile `tile` of x for multiply. `packed` has room for all tiles: ceil(rows / kBf16TileRows) *
  /// ceil(columns / 2) * kBf16TileRows.
  void (*pack_tile)(const Bf16Matrix& x, int64_t tile, uint32_t* packed);
  /// Packs panel `panel` of x for add_outer. `packed` has room for all panels: ceil(columns / kBf16Panel) *
  /// ceil(rows / 2) * kBf16Panel.
  void (*pack_columns)(const Bf16Matrix& x, int64_t panel, uint32_t* packed);
  /// Computes out [rows, weight.rows] = x weight^T, in the columns of panels first .. last - 1.
  void (*multiply)(const uint32_t* packed, int64_t rows, const Bf16Matrix& weight, float* out, int64_t first,
                   int64_t last);
  /// Computes out [left.columns, width] += left^T right, for the rows of one group. `packed` is the right factor, of
  /// `width` columns. scratch has room for kBf16Group * ceil(left.rows / 2).
  void (*add_outer)(const Bf16Matrix& left, const uint32_t* packed, int64_t width, float* out, int64_t group,
                    uint32_t* scratch);
};

extern const Bf16Matmul kBf16MatmulAvx512;

inline constexpr int64_t kFp32TileRows = 6;  // rows of a tile of the left factor

/// The right factor. The stride of the rows counts elements. The stride of the columns is 1.
struct Fp32Weight {
  Dtype dtype;
  const void* data;
  int64_t rows, columns, stride;
};

/// The functions of one instruction set. A row of the result does not depend on any other row of x. Sizes of packed
/// buffers count floats.
struct Fp32Matmul {
  /// Packs tile `tile` of x, fp32 [rows, columns]. `packed` has room for all tiles: ceil(rows / kFp32TileRows) *
  /// kFp32TileRows * columns.
  void (*pack_tile)(const float* x, int64_t rows, int64_t columns, int64_t stride, int64_t tile, float* packed);
  /// Computes out [rows, weight.rows] = x weight^T, in the columns of panels first .. last - 1.
  void (*multiply)(const float* packed, int64_t rows, const Fp32Weight& weight, float* out, int64_t first,
                   int64_t last);
  int64_t panel;  // columns of a panel of the right factor
};

extern const Fp32Matmul kFp32MatmulBase;
extern const Fp32Matmul kFp32MatmulAvx2;
extern const Fp32Matmul kFp32MatmulAvx512;

}  // namespace lumos
