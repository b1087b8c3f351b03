"""The frame that a document is at while it is sampled, and what ends a run whose logits are no numbers.

Legend: N undecided slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lumos.sampling import GeneratedFrame, Prompt, Sampling, mask_counts
from lumos_kernels.errors import NotFiniteError
from lumos_kernels.token_ids import MASK


class FrameState:
    """The frame a document is at, in tensors that every frame reuses.

    ids: int64 [length], undecided slots hold the mask id once a step has begun.
    left: how many slots are undecided before each step, by the schedule.
    undecided: for each step int64 [N], the places of the undecided slots in the frame, ascending.
    counter: int64 [], the random counter of the step's slot 0. temperature: fp32 [], of the confidence noise.
    failed: int64 [], the first step with a confidence of NaN, or the number of steps where there was none.
    """

    def __init__(self, document: Prompt, sampling: Sampling, device: torch.device) -> None:
        self.document = document
        self.ids = document.skeleton.to(device)
        self.codes = document.code_places.to(device)
        self.forgotten = document.forgotten(sampling).to(device)
        self.left = [len(self.codes), *mask_counts(sampling.steps, len(self.codes))[:-1]]
        self.undecided = [torch.zeros(n, dtype=torch.int64, device=device) for n in self.left]
        self.seed = torch.full((), document.seed, dtype=torch.int64, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.temperature = torch.zeros((), device=device)
        self.failed = torch.full((), sampling.steps, dtype=torch.int64, device=device)
        self.steps_taken = 0

    def begin(self) -> None:
        """Start another frame: all codes are undecided."""
        self.undecided[0].copy_(self.codes)
        self.failed.fill_(len(self.left))
        self.steps_taken = 0

    def row_keys(self, places: Tensor) -> Tensor:
        """int64 [N, 2]: the random key of each undecided slot at this step."""
        return torch.stack([self.seed.expand(len(places)), self.counter + places], -1)

    def put(self, step: int, ids: Tensor, confidence: Tensor) -> None:
        """Write the ids that were drawn for the undecided slots, and note a confidence of NaN without reading it."""
        self.ids.index_copy_(0, self.undecided[step], ids)
        self.failed.clamp_max_(torch.where(confidence.isnan().any(), step, len(self.left)))

    def remembered(self) -> Tensor:
        """The ids whose keys and values stay: evenly spaced content slots are masked again."""
        return self.ids.index_fill(0, self.forgotten, MASK)

    def result(self, frame: int, visual_start: int) -> GeneratedFrame:
        document = self.document
        codes = (self.ids[self.codes] - visual_start).view(document.rows, document.cols).cpu()
        return GeneratedFrame(document.number, frame, codes, self.steps_taken)


def not_finite(model: nn.Module, document: int, frame: int, step: int) -> NotFiniteError:
    """Return the error of a frame whose logits hold NaN or an infinity, with the first weight to blame."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            bad = weight.detach().flatten()
            cause = f"{name} holds {float(bad[~bad.isfinite()][0])}"
            break
    else:
        cause = f"all weights are finite, so the activations overflow in {str(weight.dtype).removeprefix('torch.')}"
    return NotFiniteError(
        f"document {document}, frame {frame}, step {step}: the logits hold NaN or infinity, and no token can be drawn; "
        f"{cause}"
    )
