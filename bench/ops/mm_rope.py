"""mm_rope: against eager PyTorch, against the way upstream writes it, and against a copy of the same bytes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import formulas, rivals_rope
from bench.formulas import Work
from bench.registry import CEILING, Case, Contestant, Inputs, OpBench, grid
from bench.shapes import IMAGE_256P, M1B, M3B, SMOKE, TINY, VIDEO_256P, VIDEO_384P
from lumos_kernels import mm_rope
from lumos_kernels.mm_rope import contract, reference
from lumos_kernels.mm_rope.frequencies import AXES, inverse_frequencies

THETA, EPS = 10000.0, 1e-5


def build(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """q, k (slices of one fused projection with options["fused_qkv"]), positions, norms of one model-parallel row."""
    generator = torch.Generator(device).manual_seed(0)
    model, layout = case.model, case.video.layout.to(device)

    def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = mean + std * torch.randn(*shape, generator=generator, device=device)
        return values.to(case.dtype).to(dtype)

    tokens, heads, kv_heads = layout.num_tokens, model.heads, model.kv_heads
    if case.options.get("fused_qkv"):
        q, k, _ = draw(tokens, heads + 2 * kv_heads, model.head_dim).split((heads, kv_heads, kv_heads), dim=1)
        q, k = q.detach(), k.detach()
    else:
        q, k = draw(tokens, heads, model.head_dim), draw(tokens, kv_heads, model.head_dim)
    norms = [draw(1, model.head_dim, mean=mean, std=0.1) for mean in (1.0, 0.0, 1.0, 0.0)]
    args = {
        "q": q,
        "k": k,
        "positions": layout.positions,
        "content": layout.content,
        "q_norm": tuple(norms[:2]),
        "k_norm": tuple(norms[2:]),
        "eps": EPS,
    }
    if not case.backward:
        return Inputs(args)
    leaves = tuple(leaf.requires_grad_() for leaf in (q, k, *norms))
    return Inputs(args, leaves, (draw(*q.shape), draw(*k.shape)))


def ours(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    q, k, positions, q_norm, k_norm = (inputs.args[n] for n in ("q", "k", "positions", "q_norm", "k_norm"))
    return mm_rope(q, k, positions, theta=THETA, q_norm=q_norm, k_norm=k_norm, eps=EPS, impl=impl)


def _contract(inputs: Inputs) -> contract.Inputs:
    inv_freq = inverse_frequencies(THETA, inputs.q.shape[-1], inputs.q.device)
    norms = (contract.Norm(*inputs.args[name]) for name in ("q_norm", "k_norm"))
    return contract.Inputs(inputs.q, inputs.k, inputs.positions, *norms, inv_freq, EPS)


def eager(inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference's forward as plain PyTorch under autograd: fp32 inside, one rounding."""
    return reference.forward(_contract(inputs))


def _tables(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return official_tables(inputs.positions, inputs.content, THETA, inputs.q.shape[-1], inputs.q.dtype)


def official_style(inputs: Inputs) -> tuple[Tensor, ...]:
    """What every layer of the official model does: tables from the positions, LayerNorm, rotate_half."""
    cos, sin = _tables(inputs)
    q, k = (official_layer_norm(x, norm) for x, norm in ((inputs.q, inputs.q_norm), (inputs.k, inputs.k_norm)))
    return official_rotate(q, cos[:, None], sin[:, None]), official_rotate(k, cos[:, None], sin[:, None])


@functools.lru_cache(maxsize=16)
def _axis_channels(head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """int64: the channels of each axis t, h, w."""
    axes = torch.tensor([AXES[channel % len(AXES)] for channel in range(head_dim)])
    return tuple((axes == axis).nonzero()[:, 0].to(device) for axis in range(3))


def official_tables(
    positions: Tensor, content: Tensor, theta: float, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] in the activation dtype, by the official recipe (arXiv 2507.08801, section 3.2).

    Four full tables (t, h, w and text), each a product with the frequencies, doubled, cosine, sine; the channels of
    each axis copied together; text and content blended; rounded. positions: int32 [3, T]; content: bool [T].
    """
    inv_freq = inverse_frequencies(theta, head_dim, positions.device)

    def table(position_T: Tensor) -> tuple[Tensor, Tensor]:
        freqs = (inv_freq[:, None] @ position_T.float()[None, :]).T
        emb = torch.cat((freqs, freqs), dim=-1).to(torch.promote_types(dtype, torch.float32))
        return emb.cos(), emb.sin()

    text = table(positions[0])  # on text all three positions are the token's index
    axes = [table(axis) for axis in positions]
    blended = []
    for which in (0, 1):
        mixed = torch.empty_like(text[which])
        for channels, axis in zip(_axis_channels(head_dim, positions.device), axes, strict=True):
            mixed = mixed.index_copy(1, channels, axis[which][:, channels])
        blended.append(torch.where(content[:, None], mixed, text[which]).to(dtype))
    return blended[0], blended[1]


def official_layer_norm(x: Tensor, norm: tuple[Tensor, Tensor], eps: float = EPS) -> Tensor:
    """LayerNorm over head_dim without parameters, then the weight and bias repeated to every head.
    x: [..., H, D]; weight and bias: [mp, D].
    """
    weight, bias = (p.repeat_interleave(x.shape[-2] // p.shape[0], dim=0) for p in norm)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias


def official_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin; cos and sin broadcast against x [..., D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _with_copies(inputs: Inputs) -> Inputs:
    q, k = inputs.q.detach(), inputs.k.detach()
    return Inputs({"q": q, "k": k, "q_out": torch.empty_like(q), "k_out": torch.empty_like(k)})


def copy(inputs: Inputs) -> tuple[Tensor, ...]:
    """q and k copied into memory that is there already."""
    return inputs.q_out.copy_(inputs.q), inputs.k_out.copy_(inputs.k)


def clone(inputs: Inputs) -> tuple[Tensor, ...]:
    """q and k copied into fresh memory, as a functional op has to: shows what the allocator costs."""
    return inputs.q.clone(), inputs.k.clone()


def work(case: Case) -> Work:
    model = case.model
    heads = model.heads + model.kv_heads
    return formulas.mm_rope_bytes(case.video.tokens, heads, model.head_dim, case.dtype.itemsize, case.backward)


def _copy_work(case: Case) -> Work:
    heads = case.model.heads + case.model.kv_heads
    return formulas.mm_rope_bytes(case.video.tokens, heads, case.model.head_dim, case.dtype.itemsize, backward=False)


def _on_gpu(case: Case, device: str) -> bool:
    return device == "cuda"


BENCH = OpBench(
    name="mm_rope",
    build=build,
    ours=ours,
    rivals=(
        Contestant("eager", eager),
        Contestant("official style", official_style),
        Contestant(
            "Liger chain",
            rivals_rope.liger,
            prepare=rivals_rope.liger_prepare(_tables),
            available=_on_gpu,
            requires=("liger_kernel",),
            jit=True,
            slack=4.0,
        ),
        Contestant("torch.compile", rivals_rope.compiled(reference.forward, _contract), available=_on_gpu, jit=True),
        Contestant("copy", copy, CEILING, prepare=_with_copies, work=_copy_work),
        Contestant("clone", clone, CEILING, prepare=_with_copies, work=_copy_work),
    ),
    yardstick="eager",
    work=work,
    cases=(
        *grid("mm_rope", [(TINY, SMOKE)], [torch.bfloat16, torch.float32]),
        *grid("mm_rope", [(M1B, VIDEO_256P)], [torch.bfloat16]),
        *grid("mm_rope", [(M1B, IMAGE_256P), (M3B, VIDEO_256P)], [torch.bfloat16], slow=True),
        *grid("mm_rope", [(M1B, VIDEO_256P)], [torch.bfloat16], True, options={"fused_qkv": True}, suffix="-qkv"),
        *grid("mm_rope", [(M1B, VIDEO_256P)], [torch.float32], slow=True),
        *grid("mm_rope", [(M1B, VIDEO_384P), (M3B, VIDEO_384P)], [torch.bfloat16], slow=True),
    ),
)
