"""A training step of the official code, as it is and after apply_lumos_kernels: same weights, same batch, same masks.

    python -m bench.patched_official CHECKOUT                                   # a drawn 256p image
    python -m bench.patched_official CHECKOUT --sample SAMPLE.pkl --frames 1    # the beginning of an official sample

CHECKOUT is a clone of alibaba-damo-academy/Lumos; it needs transformers 4.44 and the packages that its model imports
(torchvision, which training does not use, is replaced by an empty module where it is missing). The two alternate in one
process on one model, patched and undone in turn; each peak of memory comes from a process of its own. Every gradient is
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.machinery
import json
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, measure, memory, timing
from bench.real_sample import SMALL, first_frames
from lumos import apply_lumos_kernels
from lumos.data import read_official_sample
from lumos.tokens import IGNORED, NUM_CODES, SEPARATOR, VIDEO_END, VIDEO_START, VISUAL_START, number
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.token_ids import FRAME_END, FRAME_START, MASK, NEW_LINE, TEXT_START

OFFICIAL, PATCHED = "official", "patched"
LIMITS = {"float32": 5e-5, "bfloat16": 5e-2}  # relative L2 difference of a gradient
SPECIAL = {
    "image_start_token": FRAME_START,
    "image_end_token": FRAME_END,
    "new_line_token": NEW_LINE,
    "sep_token": SEPARATOR,
    "video_start_token": VIDEO_START,
    "video_end_token": VIDEO_END,
    "mask_token": MASK,
}


def load(checkout: Path) -> types.ModuleType:
    """The official package `model`. checkout: the clone, or the folder that holds the package."""
    root = next((path.parent for path in sorted(checkout.rglob("model/configuration_xllmx_chameleon.py"))), None)
    if root is None:
        raise FileNotFoundError(f"{checkout} has no model/configuration_xllmx_chameleon.py: not a clone of Lumos")
    importlib.import_module("transformers")  # first: it asks which of the packages below exist
    for name in ("torchvision", "torchvision.transforms"):
        try:
            importlib.import_module(name)
        except ImportError:
            empty = types.ModuleType(name)
            empty.__spec__, empty.__path__ = importlib.machinery.ModuleSpec(name, None), []
            sys.modules[name] = empty
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.path.insert(0, str(root.parent))
    return importlib.import_module(root.name)


def drawn_sample(rows: int, cols: int, frames: int, text: int) -> Tensor:
    """int64 [1, L]: text, then frames of drawn codes."""
    generator = torch.Generator().manual_seed(0)
    frame = frame_skeleton(rows, cols).repeat(frames)
    codes = frame == MASK
    frame[codes] = torch.randint(VISUAL_START, VISUAL_START + NUM_CODES, (int(codes.sum()),), generator=generator)
    words = torch.randint(1, 4000, (text,), generator=generator)
    start = torch.tensor([SEPARATOR, VIDEO_START, number(1, "seconds"), number(1, "fps")])
    parts = [torch.tensor([TEXT_START]), words, start, frame, torch.tensor([VIDEO_END, SEPARATOR])]
    return torch.cat(parts)[None]


class Comparison:
    """One official model with drawn weights, and its batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.package = load(options.checkout)
        if options.sample:
            ids = first_frames(read_official_sample(options.sample).ids, options.frames)
        else:
            ids = drawn_sample(*options.grid, options.frames, options.text)
        ids = ids.expand(options.batch, -1)
        content = (ids == FRAME_START).cumsum(1) > 0
        self.ids, self.labels = ids.tolist(), torch.where(content, ids, IGNORED).tolist()
        sizes = {**SMALL, "num_hidden_layers": options.layers, "hidden_size": options.hidden}
        sizes["num_attention_heads"] = options.hidden // sizes.pop("head_dim")
        config = self.package.ChameleonXLLMXConfig(
            **sizes, model_parallel_size=1, swin_norm=False, mm_rope=True, vocabulary_map={}, mask_image_logits=False,
            dropout=0.0, z_loss_weight=0.0, vq_config=dict(VQ),
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = self.package.ChameleonXLLMXForConditionalGeneration(config).train()
        del self.model.model.vqmodel  # of an image tokenizer that nothing uses
        self.model.to(options.device)
        self.autocast = functools.partial(
            torch.autocast, options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"
        )
        self.options = options

    def step(self, side: str) -> dict[str, Tensor]:
        """Loss, frame losses and gradients of one step, the masks drawn from the same seed."""
        undo = apply_lumos_kernels(self.model, impl=self.options.impl) if side == PATCHED else lambda: None
        torch.manual_seed(0)
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            loss, extra = self.model(
                self.ids,
                self.labels,
                training=True,
                cfg=argparse.Namespace(**CFG),
                mask_schedule=self.package.get_mask_chedule("cosine"),
                special_token=SPECIAL,
            )
        loss.backward()
        undo()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **{name: value.detach() for name, (value, _) in extra.items()}, **gradients}

    def differences(self) -> tuple[float, float]:
        """Relative differences of the loss and of the worst gradient. Raises RuntimeError where that is no rounding."""
        expected = {name: value.clone() for name, value in self.step(OFFICIAL).items()}
        found = self.step(PATCHED)
        if found.keys() != expected.keys():
            raise RuntimeError(f"gradients of {sorted(found.keys() ^ expected.keys())} exist on one side only")
        errors = measure.relative_errors(tuple(found[name] for name in expected), tuple(expected.values()))
        if not max(errors) <= LIMITS[self.options.dtype]:
            worst = max(zip(errors, expected, strict=True))
            raise RuntimeError(f"the patched step differs: {worst[1]} by {worst[0]:.1e}")
        return errors[0], max(errors[1:])


VQ = {
    "embed_dim": 4, "num_embeddings": 8, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1],
    "num_res_blocks": 1, "resolution": 32,
}  # fmt: skip
CFG = {  # the options of upstream's joint training
    "MaskedAR": True, "mask_type": "tube", "min_masking_rate": 0.7, "noise_type": "mask", "train_loss": "CEChunked",
    "decay_start_coef": 1, "train_with_vis_tok": True, "vis_tok_start": VISUAL_START, "frame_closs_recorder": True,
    "compute_ntp_loss": False, "predict_all_tokens": False, "mask_contiguous_region_prob": None,
}  # fmt: skip


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    comparison = Comparison(options)
    loss_difference, gradient_difference = comparison.differences()
    calls: dict[str, Callable] = {side: functools.partial(comparison.step, side) for side in (OFFICIAL, PATCHED)}
    samples = timing.interleave(calls, options.seconds, timing.clock_for(options.device))
    ratios = [a / b for a, b in zip(samples[OFFICIAL], samples[PATCHED], strict=True)]
    result: dict[str, Any] = {
        "tokens": sum(map(len, comparison.ids)),
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
        "seconds": {side: statistics.median(times) for side, times in samples.items()},
        "speedup": statistics.median(ratios),
        "environment": environment.record(options.device, options.threads),
    }
    del comparison, calls
    result["extra_bytes"] = {
        side: memory.run_child("bench.patched_official", [*arguments, "--part", side]) for side in (OFFICIAL, PATCHED)
    }
    return result


def peak(options: argparse.Namespace) -> int | None:
    """Bytes of one side's step, gradients included, beyond the weights and the program; after a first step."""
    comparison = Comparison(options)
    for _ in range(2):
        comparison.model.zero_grad(set_to_none=True)
        found = memory.peak_of(lambda: comparison.step(options.part) and None, options.device)
    return None if found is None else found[1] - found[0]


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.patched_official", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--sample", type=Path, help="official training sample (.pkl)")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--grid", type=_grid, default=(32, 56), help="of a drawn sample, ROWSxCOLUMNS")
    parser.add_argument("--text", type=int, default=64, help="of a drawn sample")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="float32", help="bfloat16 is autocast, as upstream")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--part", choices=(OFFICIAL, PATCHED), help="only the peak of one side, in this process")
    options = parser.parse_args(arguments)
    paths = {str(path) for path in (options.checkout, options.sample) if path}
    arguments = [str(Path(word).resolve()) if word in paths else word for word in arguments]  # children run elsewhere
    torch.set_num_threads(options.threads)
    print(json.dumps(peak(options) if options.part else run(options, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
