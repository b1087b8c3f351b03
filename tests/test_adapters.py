"""peft's adapters on lm_head and the embedding, and other layers in place of lm_head: what a call gives counts."""

import copy
import logging

import official_double as official
import parallel_runs
import pytest
import torch
from test_patch import build, mixed, step
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import lumos.head
from lumos import Lumos, apply_lumos_kernels, generate_tokens
from lumos.head import LMHead
from lumos.model import frame_decay
from lumos.pipelines import Pipeline
from lumos.tokens import ByteTokenizer

peft = pytest.importorskip("peft")

LOSS = {"decay_start": 0.25, "z_loss_weight": 0.01}
KINDS = {
    "lora": {"target_modules": ["lm_head"]},
    "lora of all": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "biased": {"target_modules": ["lm_head"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "loha": None,
    "tokens": None,
}


def config_of(kind):
    if kind == "loha":
        return peft.LoHaConfig(r=4, target_modules=["lm_head"])
    if kind == "tokens":
        return peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[0, 9003, 9110])
    return peft.LoraConfig(r=4, **KINDS[kind])


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = Lumos(parallel_runs.config()).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def adapt(model, kind):
    """Adapters that change what the model computes, on the scale of its weights."""
    adapted = peft.get_peft_model(model, config_of(kind)).to(next(model.parameters()).dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_((0.5 if kind == "loha" else 0.05) * torch.randn_like(parameter))
    return adapted


def run(model, **options):
    """Loss, statistics and the gradients of what is trained."""
    batch = parallel_runs.micro_batch(2)
    masked = batch.masked
    model.zero_grad()
    out = model(masked.input_ids, labels=masked.labels, layout=batch.layout, rows=masked.rows, **{**LOSS, **options})
    if out.loss.requires_grad:
        out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_run(model, inside, **options):
    """The same by calls: hidden states, then logits of every row as the layer in place gives them."""
    batch = parallel_runs.micro_batch(2)
    lo, hi = inside.config.classes
    model.zero_grad()
    hidden = model(batch.masked.input_ids, layout=batch.layout).hidden_states
    labels = batch.masked.labels.flatten()
    target = (labels >= lo) & (labels < hi)
    logits = inside.lm_head(hidden.flatten(0, -2))[:, lo:hi].double()
    nll = F.cross_entropy(logits[target], labels[target] - lo, reduction="none")
    weight = frame_decay(batch.layout, LOSS["decay_start"]).double()[target]
    loss = (nll * weight + 0.01 * logits[target].logsumexp(-1) ** 2).mean()
    loss.backward()
    return loss, nll, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_run(model, inside, **options):
    out, grads = run(model, **options)
    loss, nll, expected = expected_run(model, inside)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.nll[out.targets].double(), nll, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (grads[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
    return grads


@pytest.mark.parametrize("kind", KINDS)
def test_training_counts_the_adapters_and_reaches_them(kind):
    plain = run(make_model())[0].loss
    model = adapt(make_model(), kind)
    grads = check_run(model, model.get_base_model())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(grads[name].any() for name in trained)
    assert (run(model)[0].loss - plain).abs() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "biased"])  # peft cannot merge that
def test_the_model_with_adapters_is_the_merged_one(kind):
    model = adapt(make_model(), kind).eval()
    out = run(model)[0]
    logits = model.get_base_model().logits(out.hidden_states, (9090, 9130))
    with model.disable_adapter():
        torch.testing.assert_close(run(model)[0].loss, run(make_model())[0].loss, rtol=1e-6, atol=0)
    merged = model.merge_and_unload()
    assert isinstance(merged, Lumos)
    ours = run(merged)[0]
    assert type(merged.lm_head) is LMHead
    torch.testing.assert_close(out.loss, ours.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, merged.logits(ours.hidden_states, (9090, 9130)), rtol=1e-6, atol=1e-6)


def test_dropout_of_an_adapter_acts_on_its_branch_alone():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).double()
    losses = {float(run(model.train())[0].loss) for _ in range(3)}
    assert len(losses) == 3
    assert len({float(run(model.eval())[0].loss) for _ in range(2)}) == 1


def test_adapters_that_peft_adds_at_each_call_still_count():
    """A mixed batch has hooks on the layers."""
    model = adapt(make_model(), "lora")
    hooked = model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: out * 2)
    doubled = run(model)[0].loss
    hooked.remove()
    assert (doubled - run(model)[0].loss).abs() > 1e-2


class Opaque(nn.Module):
    """A layer like a quantised one: no weight of the usual kind."""

    def __init__(self, layer):
        super().__init__()
        self.packed, self.scale = nn.Parameter(layer.weight.detach().clone()[:, None]), 0.5

    def forward(self, hidden):
        return F.linear(hidden, self.packed[:, 0] * self.scale)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def replaced(model, how):
    head = model.lm_head
    if how == "another layer":
        model.lm_head = Opaque(head)
    elif how == "a plain Linear":
        model.lm_head = nn.Linear(*head.weight.shape[::-1], bias=False).double()
    elif how == "a Linear with bias":
        model.lm_head = nn.Linear(*head.weight.shape[::-1]).double()
    elif how == "parametrized":
        parametrize.register_parametrization(head, "weight", Halved())
    elif how == "weight norm":
        nn.utils.parametrizations.weight_norm(head)
    elif how == "spectral norm":
        nn.utils.parametrizations.spectral_norm(head.eval())
    elif how == "pruned":
        prune.l1_unstructured(head, "weight", 0.5)
    elif how == "replaced forward":
        head.forward = lambda hidden, real=head.forward: 3 * real(hidden)
    else:
        head.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    return model


HEADS = (
    *("another layer", "a plain Linear", "a Linear with bias", "parametrized", "weight norm", "spectral norm"),
    *("pruned", "replaced forward", "pre-hook"),
)


@pytest.mark.parametrize("how", HEADS)
def test_whatever_stands_for_lm_head_is_honoured(how):
    model = replaced(make_model(), how)
    check_run(model, model)
    out = run(model)[0]
    got = model.logits(out.hidden_states, (9100, 9120))
    torch.testing.assert_close(got, model.lm_head(out.hidden_states)[..., 9100:9120], rtol=1e-9, atol=1e-12)


def test_a_layer_without_a_weight_is_told_once_and_takes_no_kernel(caplog):
    model = replaced(make_model(), "another layer")
    with caplog.at_level(logging.WARNING, "lumos"):
        lumos.head._tell.cache_clear()
        run(model), run(model)
    assert [record.getMessage().count("Opaque") for record in caplog.records] == [1]
    model.impl = {"tube_masked_loss": "native"}
    with pytest.raises(ValueError, match=r"impl of tube_masked_loss must be auto or reference .*Opaque; got 'native'"):
        run(model)


PROMPT = [torch.tensor([5, 6, 7, 8710, 9004, 8805, 8807])]
HOW = {"grid": (4, 4), "frames": 2, "steps": 3, "greedy": True, "guidance_scale": 2.0}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "biased"])
def test_generation_takes_a_peft_model_and_samples_the_merged_one(kind):
    model = adapt(make_model(torch.float32), kind)
    got = generate_tokens(model, PROMPT, **HOW)
    plain = generate_tokens(make_model(torch.float32), PROMPT, **HOW)
    expected = generate_tokens(copy.deepcopy(model).merge_and_unload(), PROMPT, **HOW)
    assert torch.equal(got[0], expected[0])
    if kind != "tokens":
        assert not torch.equal(got[0], plain[0])


def test_generation_takes_wrapped_models():
    model = make_model(torch.float32)
    expected = generate_tokens(model, PROMPT, **HOW)[0]
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (torch.compile(model), averaged, torch.compile(adapt(copy.deepcopy(model), "lora"))):
        got = generate_tokens(wrapped, PROMPT, **HOW)[0]
        assert got.shape == expected.shape
        assert torch.equal(got, expected) == (wrapped is averaged or wrapped._orig_mod is model)
    assert Pipeline(adapt(model, "lora"), ByteTokenizer(), None).model is model


@pytest.mark.parametrize(("how", "name"), [("another layer", "Opaque"), ("a Linear with bias", "Linear with one")])
def test_layers_that_cannot_be_sampled_are_named(how, name):
    with pytest.raises(ValueError, match=rf"lm_head must .*{name}"):
        generate_tokens(replaced(make_model(), how), PROMPT, **HOW)


def test_models_that_cannot_be_sampled_are_named():
    with pytest.raises(ValueError, match=r"model must be a Lumos, or one inside .*; got Linear"):
        generate_tokens(nn.Linear(2, 2), PROMPT, **HOW)
    model = make_model()
    model.lm_head.weight.placements = ("shard",)
    with pytest.raises(ValueError, match=r"model must have whole weights to sample, but lm_head.weight is sharded"):
        generate_tokens(model, PROMPT, **HOW)


@pytest.mark.parametrize("first", ["patched first", "adapted first"])
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_the_official_model_with_adapters(kind, first):
    """Patched is unpatched, inside peft too, and the undo brings the official model back."""

    def adapted(model):
        model.config.to_dict = lambda: dict(model.config.__dict__)
        return adapt(model, kind)

    expected = step(adapted(build()), *mixed())
    if first == "patched first":
        model = build()
        undo = apply_lumos_kernels(model)
        model = adapted(model)
    else:
        model = adapted(build())
        undo = apply_lumos_kernels(model)
    ours = step(model, *mixed())
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)
    undo()
    assert not any("_lumos" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, expected[name]) for name, value in step(model, *mixed()).items())


def test_another_lm_head_of_the_official_model_is_refused():
    model = build()
    model.lm_head = Opaque(model.lm_head)
    with pytest.raises(TypeError, match="has no lm_head that is a Linear without bias"):
        apply_lumos_kernels(model)
    assert isinstance(model, official.TrainingModel)


def test_a_model_with_lora_on_lm_head_compiles_whole():
    model = adapt(make_model(torch.float32), "lora of all")
    expected, gradients = run(model)
    out, compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(out.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}"], gradient, msg=name)
