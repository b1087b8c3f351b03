"""Arguments that are no tensors, or pairs that are none, are refused by name in every op."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lumos_kernels import FrameLayout, RowLimits, Text, frame_attention, masked_sample, mm_rope, tube_masked_loss
from lumos_kernels.testing import assert_bitwise_equal

X = torch.randn(3, 2, 32)
POSITIONS = torch.zeros(3, 3, dtype=torch.int32)
WEIGHT, BIAS = torch.ones(1, 32), torch.zeros(1, 32)
HIDDEN, LM_HEAD, LABELS = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([5, -100, 9, 6])


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ((WEIGHT, None), r"q_norm bias must be a tensor \[mp, D\] with mp = 1, D = 32; got NoneType"),
        ((None, BIAS), r"q_norm weight must be a tensor \[mp, D\] with D = 32; got NoneType"),
        ((WEIGHT,), r"q_norm must be None or \(weight, bias\), two tensors \[mp, D\]; got tuple"),
        (WEIGHT, r"q_norm must be None or \(weight, bias\), two tensors \[mp, D\]; got float32 \[1, 32\] on cpu"),
        ((WEIGHT, [0.0] * 32), "q_norm bias must be a tensor .*; got list"),
    ],
    ids=["no bias", "no weight", "one", "a tensor", "a list"],
)
def test_a_norm_is_a_pair_of_tensors(norm, message):
    with pytest.raises(ValueError, match=message):
        mm_rope(X, X, POSITIONS, q_norm=norm)
    with pytest.raises(ValueError, match=message.replace("q_norm", "k_norm")):
        mm_rope(X, X, POSITIONS, k_norm=norm)


def test_a_list_of_two_tensors_is_a_norm():
    for a, b in zip(
        mm_rope(X, X, POSITIONS, q_norm=[WEIGHT, BIAS]), mm_rope(X, X, POSITIONS, q_norm=(WEIGHT, BIAS)), strict=True
    ):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("classes", [(5,), 5, None, (1.0, 9.0), (9, 5), (0, 21), (-1, 5)], ids=str)
def test_classes_are_two_ids(classes):
    with pytest.raises(ValueError, match="classes must satisfy 0 <= first < last <= 20"):
        tube_masked_loss(HIDDEN, LM_HEAD, LABELS, classes=classes)
    with pytest.raises(ValueError, match="classes must satisfy 0 <= first < last <= 20"):
        masked_sample(HIDDEN, None, LM_HEAD, classes=classes)


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"k must be a tensor \[T, Hkv, D\].*; got NoneType"):
        mm_rope(X, None, POSITIONS)
    with pytest.raises(ValueError, match=r"labels must be a tensor \[T\] with T = 4; got list"):
        tube_masked_loss(HIDDEN, LM_HEAD, [5, 6, 7, 8], classes=(5, 10))
    with pytest.raises(ValueError, match=r"weight must be a tensor \[V, C\] with C = 8; got NoneType"):
        masked_sample(HIDDEN, None, None, classes=(5, 10))


def test_a_layout_is_no_row_limits():
    layout = FrameLayout.from_segments([[Text(3)]])
    with pytest.raises(ValueError, match=r"limits must be RowLimits, e.g. FrameLayout.limits; got FrameLayout"):
        frame_attention(X, X, X, layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", [1.0]], ids=str)
def test_options_are_finite_numbers(value):
    with pytest.raises(ValueError, match="z_loss_weight must be a finite number; got"):
        tube_masked_loss(HIDDEN, LM_HEAD, LABELS, classes=(5, 10), z_loss_weight=value)
    with pytest.raises(ValueError, match=r"temperature must be a finite number > 0 .*; got"):
        masked_sample(HIDDEN, None, LM_HEAD, classes=(5, 10), temperature=value)
    if value is not None:
        limits = RowLimits.from_kv(torch.zeros(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32), 3)
        with pytest.raises(ValueError, match="scale must be None or a finite number; got"):
            frame_attention(X, X, X, limits, scale=value)
        with pytest.raises(ValueError, match="guidance_scale must be None or a finite number; got"):
            masked_sample(HIDDEN, HIDDEN, LM_HEAD, classes=(5, 10), guidance_scale=value)
    if value != float("inf"):
        for options in ({"theta": value}, {"eps": value}):
            with pytest.raises(ValueError, match="theta must be > 0 and eps >= 0; got"):
                mm_rope(X, X, POSITIONS, **options)


def test_numbers_of_numpy_serve_as_options():
    two = np.float32(2)
    expected = masked_sample(HIDDEN, 2 * HIDDEN, LM_HEAD, classes=(5, 10), guidance_scale=2.0, greedy=True)
    got = masked_sample(HIDDEN, 2 * HIDDEN, LM_HEAD, classes=(5, 10), guidance_scale=two, greedy=True)
    assert_bitwise_equal(got[1], expected[1])


def test_limits_and_generators_are_what_they_must_be():
    with pytest.raises(ValueError, match=r"limits must be RowLimits, .*; got NoneType"):
        frame_attention(X, X, X, None)
    with pytest.raises(ValueError, match=r"generator must be None or a torch\.Generator; got int"):
        masked_sample(HIDDEN, None, LM_HEAD, classes=(5, 10), generator=5)
