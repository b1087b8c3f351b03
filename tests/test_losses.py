"""The loss options in a training step over micro-batches of very different sizes, in fp64 against their formulas."""

import itertools
import math

import pytest
import torch
from test_model import CLASSES, small_model, video

from lumos.data import collate
from lumos.masking import mask_tokens
from lumos.train import MicroBatch, TrainConfig, training_step
from lumos_kernels import FrameLayout

OPTIONS = [
    {},
    {"z_loss": 0.05},
    {"focal_gamma": 2.0},
    {"focal_gamma": 1.0},
    {"decay_start": 0.2},
    {"decay_start": 0.0, "z_loss": 0.05},
    {"focal_gamma": 3.5, "z_loss": 0.05},
    {"focal_gamma": 2.0, "decay_start": 1.7, "z_loss": 0.05},
]


def micro_batch(documents, seed, **options):
    batch = collate(documents)
    layout = FrameLayout.from_tokens(batch.input_ids, batch.cu_seqlens)
    seeds = range(seed, seed + len(documents))
    return MicroBatch(mask_tokens(batch.input_ids, layout, seeds=seeds, classes=CLASSES, **options), layout)


@pytest.fixture(scope="module")
def step():
    """Streams of 7 to some 400 target slots: a small image, videos of several grids with given frames, a mixed one."""
    torch.manual_seed(3)
    return [
        micro_batch([video(4, 4, frames=1)], 0, min_rate=0.3, schedule="pow0.01"),
        micro_batch([video(8, 12, frames=4), video(4, 8, frames=2)], 1, given_frames=1),
        micro_batch([video(4, 8, frames=3), video(8, 8, frames=1), video(4, 4, frames=5)], 5, kind="DiffForcing"),
    ]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def expected(model, step, z_loss=0.0, focal_gamma=0.0, decay_start=None):
    """(loss, nll of each slot, frame of each slot) of all micro-batches together, each document by itself."""
    terms, plain, frames = [], [], []
    for batch in step:
        bounds = batch.layout.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            ids, labels = batch.masked.input_ids[begin:end], batch.masked.labels[begin:end]
            targets = labels >= 0
            hidden = model(ids[None]).hidden_states[0][targets]
            logits = hidden @ model.lm_head.weight[CLASSES[0] : CLASSES[1]].T
            log_p = (logits - logits.exp().sum(-1, keepdim=True).log()).gather(1, labels[targets, None] - CLASSES[0])[
                :, 0
            ]
            frame = batch.layout.frame_index[begin:end]
            count = int(frame.max()) + 1
            frame = frame[targets].long()
            weight = torch.ones(count, dtype=torch.float64)
            if decay_start is not None:
                weight = torch.linspace(decay_start, 1, count, dtype=torch.float64)
            focal = (1 - log_p.exp()) ** focal_gamma
            terms.append(-weight[frame] * focal * log_p + z_loss * logits.exp().sum(-1).log() ** 2)
            plain.append(-log_p.detach())
            frames.append(frame)
    return torch.cat(terms).mean(), torch.cat(plain), torch.cat(frames)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_has_the_loss_and_gradient_of_all_its_slots_together(step, options):
    model = small_model().double()
    model.impl = "reference"
    sizes = [batch.num_targets for batch in step]
    assert max(sizes) > 20 * min(sizes), "equal sizes would not show a wrong weighting"
    loss, nll, frame = expected(model, step, **options)
    loss.backward()
    wanted = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for order in (step, step[::-1]):
        stats = training_step(model, optimizer, order, math.inf, loss=TrainConfig(**options).loss_options())
        assert float(stats.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
        for name, gradient in gradients(model).items():
            error = (gradient - wanted[name]).norm() / wanted[name].norm()
            assert error < 1e-6, (name, error)
        # What is recorded is the plain cross entropy, whatever is optimised.
        assert len(stats.frame_losses) == 5
        for number, value in enumerate(stats.frame_losses.tolist()):
            assert value == pytest.approx(float(nll[frame == number].mean()), rel=1e-6)


def test_each_option_changes_the_gradient(step):
    """... so that the test above cannot pass with options that are lost on their way."""
    model = small_model().double()
    seen = []
    for options in OPTIONS:
        model.zero_grad()
        expected(model, step, **options)[0].backward()
        gradient = torch.cat([g.flatten() for g in gradients(model).values()])
        assert all((gradient - other).norm() > 1e-3 * other.norm() for other in seen), options
        seen.append(gradient)
