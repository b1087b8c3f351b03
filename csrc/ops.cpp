// The CPU ops under torch's stable ABI: one library for every torch from TORCH_TARGET_VERSION on and every Python.
//
// Tensors become the plain structs of csrc/include/lumos here, and threads are handed out here; kernels know neither.
// Callers (lumos_kernels/*/native.py) have validated shapes, dtypes and devices.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "huge_pages.h"
#include "lumos/frame_attention.h"
#include "lumos/mm_rope.h"
#include "lumos/tube_loss.h"
#include "op_common.h"

namespace lumos {
namespace {

ConstHeads read_heads(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Heads write_heads(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

/// Floats for one thread, aligned to a cache line. std::aligned_alloc wants a multiple of the alignment.
struct Scratch {
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), std::free) {
    STD_TORCH_CHECK(data, "out of memory for a scratch buffer of ", floats, " floats");
  }
  std::unique_ptr<float, decltype(&std::free)> data;
};

// ---- mm_rope ----

const MMRopeKernels& mm_rope_kernels(int64_t isa) {
  return kernels_for(isa, kMMRopeAvx512, kMMRopeAvx2, kMMRopeBase);
}

MMRopeProblem mm_rope_problem(const Tensor& q, const Tensor& positions, const Tensor& inv_freq, double eps) {
  MMRopeProblem problem{};
  problem.dtype = dtype_of(q);
  problem.head_dim = q.size(2);
  problem.positions = positions.const_data_ptr<int32_t>();
  problem.axis_stride = positions.stride(0);
  problem.token_stride = positions.stride(1);
  problem.inv_freq = inv_freq.const_data_ptr<float>();
  problem.eps = static_cast<float>(eps);
  return problem;
}

MMRopeTensor mm_rope_tensor(const Tensor& x, const Tensor& out, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias) {
  MMRopeTensor tensor{};
  tensor.heads = x.size(1);
  tensor.x = read_heads(x);
  tensor.out = write_heads(out);
  if (weight) {
    tensor.weight = weight->const_data_ptr<float>();
    tensor.bias = bias->const_data_ptr<float>();
    tensor.norm_rows = weight->size(0);
  }
  return tensor;
}

/// Norms fp32 and contiguous, inv_freq fp32 [D/2] contiguous; q and k have a unit last stride.
std::tuple<Tensor, Tensor> mm_rope_forward(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
                                           std::optional<Tensor> q_bias, std::optional<Tensor> k_weight,
                                           std::optional<Tensor> k_bias, Tensor inv_freq, double eps, int64_t isa) {
  const int64_t tokens = q.size(0);
  Tensor q_out = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor k_out = empty_on_cpu(k.sizes(), k.scalar_type());
  MMRopeProblem problem = mm_rope_problem(q, positions, inv_freq, eps);
  problem.tensors[0] = mm_rope_tensor(q, q_out, q_weight, q_bias);
  problem.tensors[1] = mm_rope_tensor(k, k_out, k_weight, k_bias);
  const MMRopeKernels& kernels = mm_rope_kernels(isa);
  torch::stable::parallel_for(0, tokens, kMMRopeBlock, [&](int64_t first, int64_t last) {
    const Scratch scratch(kMMRopeScratch * problem.head_dim);
    kernels.forward(problem, first, last, scratch.data.get());
  });
  return {q_out, k_out};
}

/// The gradients of weight and bias: the blocks' partial sums [blocks, 2, rows, D] added in order, in double.
std::tuple<Tensor, Tensor> add_partials(const Tensor& partials) {
  const int64_t blocks = partials.size(0), rows = partials.size(2), head_dim = partials.size(3);
  Tensor total = torch::stable::new_zeros(partials, {2 * rows * head_dim});
  double* sums = total.mutable_data_ptr<double>();
  const double* terms = partials.const_data_ptr<double>();
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < 2 * rows * head_dim; ++i) sums[i] += *terms++;
  }
  Tensor dweight = empty_on_cpu({rows, head_dim}, ScalarType::Float);
  Tensor dbias = empty_on_cpu({rows, head_dim}, ScalarType::Float);
  std::copy(sums, sums + rows * head_dim, dweight.mutable_data_ptr<float>());
  std::copy(sums + rows * head_dim, sums + 2 * rows * head_dim, dbias.mutable_data_ptr<float>());
  return {dweight, dbias};
}

/// Adds the upstream gradient and the workspace of the norm's gradients [blocks, 2, rows, D], empty without a norm.
Tensor add_backward(MMRopeTensor& tensor, const Tensor& grad, int64_t blocks, int64_t head_dim) {
  tensor.grad = read_heads(grad);
  Tensor partials = empty_on_cpu({blocks, 2, tensor.norm_rows, head_dim}, ScalarType::Double);
  tensor.partials = partials.mutable_data_ptr<double>();
  return partials;
}

/// As forward; grad_q and grad_k have a unit last stride. Gradients of the norms are fp32, [0, D] without a norm.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mm_rope_backward(
    Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
    std::optional<Tensor> q_bias, std::optional<Tensor> k_weight, std::optional<Tensor> k_bias, Tensor inv_freq,
    double eps, int64_t isa) {
  const int64_t tokens = q.size(0), blocks = (tokens + kMMRopeBlock - 1) / kMMRopeBlock;
  Tensor dq = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor dk = empty_on_cpu(k.sizes(), k.scalar_type());
  MMRopeProblem problem = mm_rope_problem(q, positions, inv_freq, eps);
  problem.tensors[0] = mm_rope_tensor(q, dq, q_weight, q_bias);
  problem.tensors[1] = mm_rope_tensor(k, dk, k_weight, k_bias);
  const Tensor q_partials = add_backward(problem.tensors[0], grad_q, blocks, problem.head_dim);
  const Tensor k_partials = add_backward(problem.tensors[1], grad_k, blocks, problem.head_dim);
  const MMRopeKernels& kernels = mm_rope_kernels(isa);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch(kMMRopeScratch * problem.head_dim);
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min(tokens, (block + 1) * kMMRopeBlock);
      kernels.backward(problem, block, block * kMMRopeBlock, end, scratch.data.get());
    }
  });
  auto [dq_weight, dq_bias] = add_partials(q_partials);
  auto [dk_weight, dk_bias] = add_partials(k_partials);
  return {dq, dk, dq_weight, dq_bias, dk_weight, dk_bias};
}

// ---- frame_attention ----

const FrameAttentionKernels& frame_attention_kernels(int64_t isa, Dtype dtype) {
  const bool bf16 = dtype == Dtype::bf16;
  switch (static_cast<Isa>(isa)) {
    case Isa::amx_model:
      return bf16 ? kFrameAttentionAmxModel : kFrameAttentionAvx512;
    case Isa::amx:
      return bf16 ? kFrameAttentionAmx : kFrameAttentionAvx512;
    case Isa::avx512_bf16:
      return bf16 ? kFrameAttentionAvx512Bf16 : kFrameAttentionAvx512;
    case Isa::avx512:
      return kFrameAttentionAvx512;
    case Isa::avx2:
      return kFrameAttentionAvx2;
    case Isa::base:
      return kFrameAttentionBase;
  }
  STD_TORCH_CHECK(false, "no instruction set ", isa);
}

/// Calls body(item, scratch) for the items 0 .. count - 1: they start in order, and whoever is free takes the next.
/// Kernels' begin and end go around a thread's items.
template <class Body>
void each_item(const FrameAttentionKernels& kernels, int64_t count, int64_t scratch_floats, const Body& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  // Before the threads start: one that gives up would leave another waiting for its item.
  const int64_t floats = (scratch_floats + 15) / 16 * 16;
  const Scratch scratch(workers * floats);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    kernels.begin();
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t item = next++; item < count; item = next++) body(item, scratch.data.get() + worker * floats);
    }
    kernels.end();
  });
}

FrameAttentionProblem frame_attention_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& kv_start, const Tensor& kv_end, const Tensor& q_start,
                                              const Tensor& q_end, double scale) {
  FrameAttentionProblem problem{};
  problem.dtype = dtype_of(q);
  problem.queries = q.size(0);
  problem.keys = k.size(0);
  problem.q_heads = q.size(1);
  problem.kv_heads = k.size(1);
  problem.head_dim = q.size(2);
  problem.scale = static_cast<float>(scale);
  problem.q = read_heads(q);
  problem.k = read_heads(k);
  problem.v = read_heads(v);
  problem.kv_start = kv_start.const_data_ptr<int32_t>();
  problem.kv_end = kv_end.const_data_ptr<int32_t>();
  problem.q_start = q_start.const_data_ptr<int32_t>();
  problem.q_end = q_end.const_data_ptr<int32_t>();
  return problem;
}

/// Query tiles of the forward pass, those that see most keys first.
std::vector<int64_t> heaviest_first(const FrameAttentionProblem& problem) {
  std::vector<std::pair<int64_t, int64_t>> tiles;  // minus the keys, first token
  for (int64_t first = 0; first < problem.queries; first += problem.tile) {
    const int64_t last = std::min(problem.queries, first + problem.tile) - 1;
    tiles.emplace_back(problem.kv_start[first] - int64_t{problem.kv_end[last]}, first);
  }
  std::sort(tiles.begin(), tiles.end());
  std::vector<int64_t> firsts;
  for (const auto& tile : tiles) firsts.push_back(tile.second);
  return firsts;
}

/// Limits contiguous int32; q, k and v have a unit last stride.
std::tuple<Tensor, Tensor> frame_attention_forward(Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_end,
                                                   Tensor q_start, Tensor q_end, double scale, int64_t isa) {
  FrameAttentionProblem problem = frame_attention_problem(q, k, v, kv_start, kv_end, q_start, q_end, scale);
  Tensor o = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor lse = empty_on_cpu({problem.q_heads, problem.queries}, ScalarType::Float);
  problem.o = write_heads(o);
  problem.lse = lse.mutable_data_ptr<float>();
  const FrameAttentionKernels& kernels = frame_attention_kernels(isa, problem.dtype);
  problem.tile = kernels.forward_tile(problem.q_heads / problem.kv_heads);
  const std::vector<int64_t> tiles = heaviest_first(problem);
  const int64_t items = static_cast<int64_t>(tiles.size()) * problem.kv_heads;
  each_item(kernels, items, kernels.forward_scratch(problem), [&](int64_t item, float* scratch) {
    kernels.forward(problem, item % problem.kv_heads, tiles[item / problem.kv_heads], scratch);
  });
  return {o, lse};
}

/// As forward; grad_o has a unit last stride, grad_lse, o and lse are contiguous.
std::tuple<Tensor, Tensor, Tensor> frame_attention_backward(Tensor grad_o, std::optional<Tensor> grad_lse, Tensor q,
                                                            Tensor k, Tensor v, Tensor o, Tensor lse, Tensor kv_start,
                                                            Tensor kv_end, Tensor q_start, Tensor q_end, double scale,
                                                            int64_t isa) {
  FrameAttentionProblem problem = frame_attention_problem(q, k, v, kv_start, kv_end, q_start, q_end, scale);
  const FrameAttentionKernels& kernels = frame_attention_kernels(isa, problem.dtype);
  const int64_t query_tiles = (problem.queries + kernels.query_tile - 1) / kernels.query_tile;
  const int64_t key_tiles = (problem.keys + kernels.key_tile - 1) / kernels.key_tile;
  Tensor dq = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor dk = empty_on_cpu(k.sizes(), k.scalar_type());
  Tensor dv = empty_on_cpu(v.sizes(), v.scalar_type());
  Tensor delta = empty_on_cpu(lse.sizes(), ScalarType::Float);
  Tensor sums = empty_on_cpu({problem.q_heads, query_tiles, problem.head_dim, kernels.query_tile}, ScalarType::Float);
  std::vector<std::atomic<int64_t>> done(problem.kv_heads * key_tiles);
  for (auto& counter : done) counter = 0;
  problem.o = write_heads(o);
  problem.lse = lse.mutable_data_ptr<float>();
  problem.grad_o = read_heads(grad_o);
  problem.grad_lse = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
  problem.delta = delta.mutable_data_ptr<float>();
  problem.dq_sums = sums.mutable_data_ptr<float>();
  problem.done = done.data();
  problem.dq = write_heads(dq);
  problem.dk = write_heads(dk);
  problem.dv = write_heads(dv);
  const int64_t scratch_floats = kernels.backward_scratch(problem);
  each_item(kernels, query_tiles, 0, [&](int64_t tile, float*) { kernels.prepare(problem, tile); });
  each_item(kernels, key_tiles * problem.kv_heads, scratch_floats, [&](int64_t item, float* scratch) {
    kernels.backward(problem, item % problem.kv_heads, item / problem.kv_heads, scratch);
  });
  each_item(kernels, query_tiles, scratch_floats,
            [&](int64_t tile, float* scratch) { kernels.finish(problem, tile, scratch); });
  return {dq, dk, dv};
}

// ---- tube_masked_loss ----

const TubeLossKernels& tube_loss_kernels(int64_t isa) {
  return kernels_for(isa, kTubeLossAvx512, kTubeLossAvx2, kTubeLossBase);
}

/// logits fp32 [R, classes] contiguous; targets int64 [R]; kept [R, K], bf16 or fp32 with a unit last stride.
TubeLossBlock tube_loss_block(const Tensor& logits, const Tensor& targets, int64_t first,
                              const std::optional<Tensor>& kept) {
  TubeLossBlock block{};
  block.classes = logits.size(1);
  block.first = first;
  block.logits = logits.const_data_ptr<float>();
  block.targets = targets.const_data_ptr<int64_t>();
  if (kept) {
    block.dtype = dtype_of(*kept);
    block.kept = kept->mutable_data_ptr();
    block.kept_stride = kept->stride(0);
  }
  return block;
}

/// maximum and sum fp32 [R, blocks], target_logit fp32 [R], beaten bool [R]: contiguous.
TubeLossStats tube_loss_stats(const Tensor& maximum, const Tensor& sum, const Tensor& target_logit,
                              const Tensor& beaten) {
  return {maximum.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(), target_logit.mutable_data_ptr<float>(),
          beaten.mutable_data_ptr<bool>()};
}

void tube_loss_reduce(Tensor logits, Tensor targets, int64_t first, int64_t block_index, Tensor maximum, Tensor sum,
                      Tensor target_logit, Tensor beaten, std::optional<Tensor> kept, int64_t isa) {
  TubeLossBlock block = tube_loss_block(logits, targets, first, kept);
  block.block = block_index;
  block.blocks = maximum.size(1);
  const TubeLossStats stats = tube_loss_stats(maximum, sum, target_logit, beaten);
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    tube_loss_kernels(isa).reduce(block, stats, begin, end);
  });
}

/// Of `classes` classes in blocks of block_classes. row_weight fp32 [R]; returns nll, lse and correct, [R].
std::tuple<Tensor, Tensor, Tensor> tube_loss_finish(Tensor targets, std::optional<Tensor> row_weight, double z_loss,
                                                    int64_t classes, int64_t block_classes, Tensor maximum, Tensor sum,
                                                    Tensor target_logit, Tensor beaten, std::optional<Tensor> kept,
                                                    int64_t isa) {
  const int64_t rows = targets.size(0);
  Tensor nll = empty_on_cpu({rows}, ScalarType::Float);
  Tensor lse = empty_on_cpu({rows}, ScalarType::Float);
  Tensor correct = empty_on_cpu({rows}, ScalarType::Bool);
  TubeLossFinish job{};
  job.classes = classes;
  job.block_classes = block_classes;
  job.blocks = maximum.size(1);
  job.targets = targets.const_data_ptr<int64_t>();
  job.row_weight = row_weight ? row_weight->const_data_ptr<float>() : nullptr;
  job.z_loss = static_cast<float>(z_loss);
  if (kept) {
    job.dtype = dtype_of(*kept);
    job.kept = kept->mutable_data_ptr();
    job.kept_stride = kept->stride(0);
  }
  job.nll = nll.mutable_data_ptr<float>();
  job.lse = lse.mutable_data_ptr<float>();
  job.correct = correct.mutable_data_ptr<bool>();
  const TubeLossStats stats = tube_loss_stats(maximum, sum, target_logit, beaten);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    tube_loss_kernels(isa).finish(job, stats, begin, end);
  });
  return {nll, lse, correct};
}

/// lse, dnll and dlse fp32 [R], contiguous.
void tube_loss_gradient(Tensor logits, Tensor targets, int64_t first, Tensor lse, Tensor dnll, Tensor dlse, Tensor kept,
                        int64_t isa) {
  const TubeLossBlock block = tube_loss_block(logits, targets, first, kept);
  const TubeLossGradient upstream{lse.const_data_ptr<float>(), dnll.const_data_ptr<float>(),
                                  dlse.const_data_ptr<float>()};
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    tube_loss_kernels(isa).gradient(block, upstream, begin, end);
  });
}

/// Null where the instruction set has no bf16 products.
const TubeLossDots* tube_loss_dots(int64_t isa) {
  return static_cast<Isa>(isa) >= Isa::avx512_bf16 ? &kTubeLossDotsAvx512 : nullptr;
}

/// bf16 with a unit last stride.
TubeLossMatrix tube_loss_matrix(const Tensor& x) {
  return {static_cast<const BFloat16*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

/// x [R, C] as the left factor of the logits; empty where the matmuls are torch's.
Tensor tube_loss_pack_rows(Tensor x, int64_t isa) {
  const TubeLossDots* dots = tube_loss_dots(isa);
  const TubeLossMatrix from = tube_loss_matrix(x);
  const int64_t tiles = ceil_div(from.rows, kTubeLossTileRows), pairs = ceil_div(from.columns, 2);
  Tensor packed = empty_on_cpu({dots ? tiles * pairs * kTubeLossTileRows : 0}, ScalarType::Int);
  if (!dots) return packed;
  uint32_t* to = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) dots->pack_tile(from, tile, to);
  });
  return packed;
}

/// out fp32 [R, classes] = x weight^T; weight bf16 with a unit last stride, packed from tube_loss_pack_rows(x).
void tube_loss_logits(Tensor packed, Tensor weight, Tensor out, int64_t isa) {
  const TubeLossDots* dots = tube_loss_dots(isa);
  STD_TORCH_CHECK(dots, "no bf16 products on this CPU");
  const TubeLossMatrix classes = tube_loss_matrix(weight);
  const uint32_t* left = reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int32_t>());
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(classes.rows, kTubeLossPanel), 1, [&](int64_t first, int64_t last) {
    dots->logits(left, out.size(0), classes, to, first, last);
  });
}

/// dweight fp32 [K, C] += dlogits^T x; dlogits [R, K] and x [R, C] bf16 with unit last strides.
void tube_loss_add_outer(Tensor dlogits, Tensor x, Tensor dweight, int64_t isa) {
  const TubeLossDots* dots = tube_loss_dots(isa);
  STD_TORCH_CHECK(dots, "no bf16 products on this CPU");
  const TubeLossMatrix left = tube_loss_matrix(dlogits), from = tube_loss_matrix(x);
  const int64_t panels = ceil_div(from.columns, kTubeLossPanel), pairs = ceil_div(from.rows, 2);
  Tensor packed = empty_on_cpu({panels * pairs * kTubeLossPanel}, ScalarType::Int);
  uint32_t* right = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) dots->pack_columns(from, panel, right);
  });
  float* sums = dweight.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(left.columns, kTubeLossGroup), 1, [&](int64_t first, int64_t last) {
    const Scratch scratch(kTubeLossGroup * pairs);
    uint32_t* tiles = reinterpret_cast<uint32_t*>(scratch.data.get());
    for (int64_t group = first; group < last; ++group) {
      dots->add_outer(left, right, from.columns, sums, group, tiles);
    }
  });
}

}  // namespace
}  // namespace lumos

// The instruction set is an int: torch's stable ABI leaks a std::string for every string argument (seen in 2.13).
STABLE_TORCH_LIBRARY(lumos_native, m) {
  m.def(
      "frame_attention_forward(Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_end, Tensor q_start, "
      "Tensor q_end, float scale, int isa) -> (Tensor, Tensor)");
  m.def(
      "frame_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor kv_start, Tensor kv_end, Tensor q_start, Tensor q_end, float scale, int isa) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mm_rope_forward(Tensor q, Tensor k, Tensor positions, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
      "Tensor? k_bias, Tensor inv_freq, float eps, int isa) -> (Tensor, Tensor)");
  m.def(
      "mm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, Tensor? q_weight, "
      "Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor inv_freq, float eps, int isa) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "tube_loss_reduce(Tensor logits, Tensor targets, int first, int block, Tensor(a!) maximum, Tensor(b!) sum, "
      "Tensor(c!) target_logit, Tensor(d!) beaten, Tensor(e!)? kept, int isa) -> ()");
  m.def(
      "tube_loss_finish(Tensor targets, Tensor? row_weight, float z_loss, int classes, int block_classes, "
      "Tensor maximum, Tensor sum, Tensor target_logit, Tensor beaten, Tensor(a!)? kept, int isa) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "tube_loss_gradient(Tensor logits, Tensor targets, int first, Tensor lse, Tensor dnll, Tensor dlse, "
      "Tensor(a!) kept, int isa) -> ()");
  m.def("tube_loss_pack_rows(Tensor x, int isa) -> Tensor");
  m.def("tube_loss_logits(Tensor packed, Tensor weight, Tensor(a!) out, int isa) -> ()");
  m.def("tube_loss_add_outer(Tensor dlogits, Tensor x, Tensor(a!) dweight, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("frame_attention_forward", TORCH_BOX(&lumos::frame_attention_forward));
  m.impl("frame_attention_backward", TORCH_BOX(&lumos::frame_attention_backward));
  m.impl("mm_rope_forward", TORCH_BOX(&lumos::mm_rope_forward));
  m.impl("mm_rope_backward", TORCH_BOX(&lumos::mm_rope_backward));
  m.impl("tube_loss_reduce", TORCH_BOX(&lumos::tube_loss_reduce));
  m.impl("tube_loss_finish", TORCH_BOX(&lumos::tube_loss_finish));
  m.impl("tube_loss_gradient", TORCH_BOX(&lumos::tube_loss_gradient));
  m.impl("tube_loss_pack_rows", TORCH_BOX(&lumos::tube_loss_pack_rows));
  m.impl("tube_loss_logits", TORCH_BOX(&lumos::tube_loss_logits));
  m.impl("tube_loss_add_outer", TORCH_BOX(&lumos::tube_loss_add_outer));
}
