// Registers frame_attention under torch's stable ABI and hands its items to the threads.
#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "frame_attention/problem.h"
#include "stable_abi/huge_pages.h"
#include "stable_abi/tensors.h"

namespace lumos {
namespace {

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

/// Calls body(item, scratch) for the items 0 .. count - 1, with kernels.begin() and kernels.end() around the items of a
/// thread.
///
/// Items start in ascending order, since a free thread takes the next number of one counter. An item of backward waits
/// for the item of the key tile before (see backward.h). With another order the threads could wait for each other.
template <class Body>
void each_item(const FrameAttentionKernels& kernels, int64_t count, int64_t scratch_floats, const Body& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  // The scratch is allocated before the threads start. A thread that ran out of memory would leave another waiting for
  // its item.
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

/// The limits of the queries, with 0 <= start <= end <= keys whatever the caller gave.
struct SafeLimits {
  std::vector<int32_t> start, end;

  SafeLimits(const Tensor& kv_start, const Tensor& kv_end, int64_t queries, int64_t keys)
      : start(queries), end(queries) {
    check_tensor("kv_start", kv_start, {queries}, ScalarType::Int);
    check_tensor("kv_end", kv_end, {queries}, ScalarType::Int);
    const int32_t *from = kv_start.const_data_ptr<int32_t>(), *to = kv_end.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t first = std::clamp<int64_t>(from[i], 0, keys);
      start[i] = static_cast<int32_t>(first);
      end[i] = static_cast<int32_t>(std::clamp<int64_t>(to[i], first, keys));
    }
  }
};

/// Raises an error unless k and v fit q, and a kernel computes the head size.
void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q and k must be [T, H, D]");
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "the kv heads must divide the query heads; got ",
                  kv_heads, " and ", heads);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 32 == 0, "the head size must be a multiple of 32; got ", head_dim);
  check_tensor("q", q, {q.size(0), heads, head_dim}, q.scalar_type(), Strides::unit_last);
  check_tensor("k", k, {k.size(0), kv_heads, head_dim}, q.scalar_type(), Strides::unit_last);
  check_tensor("v", v, {k.size(0), kv_heads, head_dim}, q.scalar_type(), Strides::unit_last);
}

FrameAttentionProblem frame_attention_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const SafeLimits& limits, double scale) {
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
  problem.kv_start = limits.start.data();
  problem.kv_end = limits.end.data();
  return problem;
}

/// Returns the first tokens of the query tiles of the forward pass. Tiles that see more keys come first.
std::vector<int64_t> heaviest_first(const FrameAttentionProblem& problem) {
  std::vector<std::pair<int64_t, int64_t>> tiles;  // (minus the number of keys, first token)
  for (int64_t first = 0; first < problem.queries; first += problem.tile) {
    const int64_t last = std::min(problem.queries, first + problem.tile);
    int64_t start = problem.keys, end = 0;
    for (int64_t i = first; i < last; ++i) {
      if (problem.kv_start[i] >= problem.kv_end[i]) continue;
      start = std::min<int64_t>(start, problem.kv_start[i]);
      end = std::max<int64_t>(end, problem.kv_end[i]);
    }
    tiles.emplace_back(std::min<int64_t>(start - end, 0), first);
  }
  std::sort(tiles.begin(), tiles.end());
  std::vector<int64_t> firsts;
  for (const auto& tile : tiles) firsts.push_back(tile.second);
  return firsts;
}

/// Returns o and lse. q, k and v have a unit last stride; the limits are int32 and contiguous, with any values.
std::tuple<Tensor, Tensor> frame_attention_forward(Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_end,
                                                   double scale, int64_t isa) {
  check_heads(q, k, v);
  const SafeLimits limits(kv_start, kv_end, q.size(0), k.size(0));
  FrameAttentionProblem problem = frame_attention_problem(q, k, v, limits, scale);
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

/// Returns the gradients of q, k and v. The inputs are as in forward; grad_o has a unit last stride; grad_lse, o and
/// lse are contiguous.
std::tuple<Tensor, Tensor, Tensor> frame_attention_backward(Tensor grad_o, std::optional<Tensor> grad_lse, Tensor q,
                                                            Tensor k, Tensor v, Tensor o, Tensor lse, Tensor kv_start,
                                                            Tensor kv_end, double scale, int64_t isa) {
  check_heads(q, k, v);
  check_tensor("grad_o", grad_o, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), Strides::unit_last);
  check_tensor("o", o, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), Strides::unit_last);
  check_tensor("lse", lse, {q.size(1), q.size(0)}, ScalarType::Float);
  if (grad_lse) check_tensor("grad_lse", *grad_lse, {q.size(1), q.size(0)}, ScalarType::Float);
  const SafeLimits limits(kv_start, kv_end, q.size(0), k.size(0));
  FrameAttentionProblem problem = frame_attention_problem(q, k, v, limits, scale);
  const FrameAttentionKernels& kernels = frame_attention_kernels(isa, problem.dtype);
  const int64_t query_tiles = ceil_div(problem.queries, kernels.query_tile);
  const int64_t key_tiles = ceil_div(problem.keys, kernels.key_tile);
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
  std::vector<Visible> visible(query_tiles);
  problem.visible = visible.data();
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

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def(
      "frame_attention_forward(Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_end, float scale, int isa) "
      "-> (Tensor, Tensor)");
  m.def(
      "frame_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor kv_start, Tensor kv_end, float scale, int isa) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("frame_attention_forward", TORCH_BOX(&lumos::frame_attention_forward));
  m.impl("frame_attention_backward", TORCH_BOX(&lumos::frame_attention_backward));
}
