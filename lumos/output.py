"""LumosOutput, the result of Lumos.forward: a dataclass whose tensors wrappers such as DDP and FSDP can find."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lumos_kernels import FrameLayout


@dataclass
class LumosOutput:
    """The loss and the hidden states of a batch. It is a pytree node, as are its layout and the layout's limits.

    loss: fp32 scalar, None without labels. hidden_states: [B, L, C] or [T, C], after the final norm.

    nll: fp32 [T], the cross entropy of each target slot, 0 elsewhere, no gradient; targets: bool [T]; both None
    without labels.
    """

    loss: Tensor | None
    hidden_states: Tensor
    layout: FrameLayout = field(repr=False)
    nll: Tensor | None = field(default=None, repr=False)
    targets: Tensor | None = field(default=None, repr=False)

    @cached_property
    def frame_losses(self) -> Tensor:
        """fp32 [F]: mean cross entropy over the target slots of frame f in all documents, nan where there are none.

        Exact for every mask, unlike upstream's estimate. Computed when read: reading it waits for the device.
        """
        sums, counts = self.frame_sums(self.layout.num_frames)
        return (sums / counts).float()

    def frame_sums(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Return the fp64 [F] sums of the cross entropy and fp64 [F] counts of target slots by frame, without a sync.

        Several devices add these up before they divide. num_frames: F, at least layout.num_frames.
        """
        if self.nll is None:
            raise ValueError("frame losses need labels: call the model with labels=")
        inside_T = self.targets & (self.layout.frame_index >= 0)  # labels of codes may stand on text
        frame_T = torch.where(inside_T, self.layout.frame_index, num_frames).long()
        sums = self.nll.new_zeros(2, num_frames + 1, dtype=torch.float64)
        sums.index_add_(1, frame_T, torch.stack([self.nll.double(), self.targets.double()]))
        return sums[0, :num_frames], sums[1, :num_frames]


# DDP(static_graph=True), FSDP2 and torch.export look for the tensors of an output in pytree nodes only.
torch.export.register_dataclass(LumosOutput, serialized_type_name="lumos.LumosOutput")
