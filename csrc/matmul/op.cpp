// Registers the matmuls that the loss and sampling share under torch's stable ABI.
#include "matmul/problem.h"
#include "stable_abi/huge_pages.h"
#include "stable_abi/tensors.h"

namespace lumos {
namespace {

/// Returns null if the instruction set has no bf16 products.
const Bf16Matmul* bf16_matmul(int64_t isa) {
  return static_cast<Isa>(isa) >= Isa::avx512_bf16 ? &kBf16MatmulAvx512 : nullptr;
}

const Bf16Matmul& checked_bf16_matmul(int64_t isa) {
  const Bf16Matmul* matmul = bf16_matmul(isa);
  STD_TORCH_CHECK(matmul, "no bf16 products on this CPU");
  return *matmul;
}

const Fp32Matmul& fp32_matmul(int64_t isa) {
  return kernels_for(isa, kFp32MatmulAvx512, kFp32MatmulAvx2, kFp32MatmulBase);
}

/// Raises an error unless x is a matrix of this dtype with a unit last stride.
void check_matrix(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix; got ", x.dim(), " dimensions");
  check_tensor(name, x, {x.size(0), x.size(1)}, dtype, Strides::unit_last);
}

/// Returns a view of x, which is bf16 with a unit last stride.
Bf16Matrix bf16_matrix(const Tensor& x) {
  check_matrix("a bf16 factor", x, ScalarType::BFloat16);
  return {static_cast<const BFloat16*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

/// Returns x [R, C], packed as the left factor of packed_matmul_bf16. The result is empty if the instruction set has no
/// bf16 products.
Tensor pack_rows_bf16(Tensor x, int64_t isa) {
  const Bf16Matmul* matmul = bf16_matmul(isa);
  const Bf16Matrix from = bf16_matrix(x);
  const int64_t tiles = ceil_div(from.rows, kBf16TileRows), pairs = ceil_div(from.columns, 2);
  Tensor packed = empty_on_cpu({matmul ? tiles * pairs * kBf16TileRows : 0}, ScalarType::Int);
  if (!matmul) return packed;
  uint32_t* to = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) matmul->pack_tile(from, tile, to);
  });
  return packed;
}

/// Computes out = x weight^T, where packed is pack_rows_bf16(x). out is fp32 [R, N] and contiguous. weight is
/// bf16 [N, C] with a unit last stride.
void packed_matmul_bf16(Tensor packed, Tensor weight, Tensor out, int64_t isa) {
  const Bf16Matmul& matmul = checked_bf16_matmul(isa);
  const Bf16Matrix right = bf16_matrix(weight);
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix; got ", out.dim(), " dimensions");
  check_tensor("out", out, {out.size(0), right.rows}, ScalarType::Float);
  const int64_t words = ceil_div(out.size(0), kBf16TileRows) * ceil_div(right.columns, 2) * kBf16TileRows;
  check_tensor("packed", packed, {words}, ScalarType::Int);
  const uint32_t* left = reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int32_t>());
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(right.rows, kBf16Panel), 1, [&](int64_t first, int64_t last) {
    matmul.multiply(left, out.size(0), right, to, first, last);
  });
}

/// Computes out += left^T right. out is fp32 [N, C] and contiguous. left [R, N] and right [R, C] are bf16 with
/// unit last strides.
void add_outer_bf16(Tensor left, Tensor right, Tensor out, int64_t isa) {
  const Bf16Matmul& matmul = checked_bf16_matmul(isa);
  const Bf16Matrix rows = bf16_matrix(left), columns = bf16_matrix(right);
  STD_TORCH_CHECK(rows.rows == columns.rows, "left and right must have the same rows; got ", rows.rows, " and ",
                  columns.rows);
  check_tensor("out", out, {rows.columns, columns.columns}, ScalarType::Float);
  const int64_t panels = ceil_div(columns.columns, kBf16Panel), pairs = ceil_div(columns.rows, 2);
  Tensor packed = empty_on_cpu({panels * pairs * kBf16Panel}, ScalarType::Int);
  uint32_t* packed_columns = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) matmul.pack_columns(columns, panel, packed_columns);
  });
  float* sums = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(rows.columns, kBf16Group), 1, [&](int64_t first, int64_t last) {
    const Scratch scratch(kBf16Group * pairs);
    uint32_t* tiles = reinterpret_cast<uint32_t*>(scratch.data.get());
    for (int64_t group = first; group < last; ++group) {
      matmul.add_outer(rows, packed_columns, columns.columns, sums, group, tiles);
    }
  });
}

/// Returns x [R, C], packed as the left factor of packed_matmul_fp32. x is fp32 with a unit last stride.
Tensor pack_rows_fp32(Tensor x, int64_t isa) {
  check_matrix("x", x, ScalarType::Float);
  const int64_t rows = x.size(0), columns = x.size(1), tiles = ceil_div(rows, kFp32TileRows);
  Tensor packed = torch::stable::empty({tiles * kFp32TileRows * columns}, ScalarType::Float);
  const float* from = x.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      fp32_matmul(isa).pack_tile(from, rows, columns, x.stride(0), tile, to);
    }
  });
  return packed;
}

/// Computes out = x weight^T, where packed is pack_rows_fp32(x). out is fp32 [R, N] and contiguous. weight is [N, C],
/// of any dtype, with a unit last stride.
void packed_matmul_fp32(Tensor packed, Tensor weight, Tensor out, int64_t isa) {
  const Fp32Matmul& matmul = fp32_matmul(isa);
  check_matrix("weight", weight, weight.scalar_type());
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix; got ", out.dim(), " dimensions");
  check_tensor("out", out, {out.size(0), weight.size(0)}, ScalarType::Float);
  const int64_t floats = ceil_div(out.size(0), kFp32TileRows) * kFp32TileRows * weight.size(1);
  check_tensor("packed", packed, {floats}, ScalarType::Float);
  const Fp32Weight right{dtype_of(weight), weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0)};
  const float* left = packed.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(right.rows, matmul.panel), 1, [&](int64_t first, int64_t last) {
    matmul.multiply(left, out.size(0), right, to, first, last);
  });
}

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def("pack_rows_bf16(Tensor x, int isa) -> Tensor");
  m.def("packed_matmul_bf16(Tensor packed, Tensor weight, Tensor(a!) out, int isa) -> ()");
  m.def("add_outer_bf16(Tensor left, Tensor right, Tensor(a!) out, int isa) -> ()");
  m.def("pack_rows_fp32(Tensor x, int isa) -> Tensor");
  m.def("packed_matmul_fp32(Tensor packed, Tensor weight, Tensor(a!) out, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("pack_rows_bf16", TORCH_BOX(&lumos::pack_rows_bf16));
  m.impl("packed_matmul_bf16", TORCH_BOX(&lumos::packed_matmul_bf16));
  m.impl("add_outer_bf16", TORCH_BOX(&lumos::add_outer_bf16));
  m.impl("pack_rows_fp32", TORCH_BOX(&lumos::pack_rows_fp32));
  m.impl("packed_matmul_fp32", TORCH_BOX(&lumos::packed_matmul_fp32));
}
