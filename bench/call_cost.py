"""Measure what a call of each op costs on tensors so small that the arithmetic takes no time.

    python -m bench.call_cost                     microseconds of a call, on this checkout
    python -m bench.call_cost --against CHECKOUT  two checkouts in turn, process by process, and their ratio

A process times each case in batches and keeps the median batch; the table shows the median of the processes. CHECKOUT
is another working tree with a built library: what a change of the Python around the kernels costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

CALLS = 200  # of a batch
BATCHES = 15


def cases() -> Mapping[str, Callable[[], object]]:
    """Calls of every op, as a model makes them: forward alone, and forward with backward."""
    import torch

    import lumos_kernels as lk

    layout = lk.FrameLayout.from_segments([[lk.Text(4), lk.Frame(4, 4)]])
    ids = torch.full((1, 16), 9003)
    tokens, classes = layout.num_tokens, (2, 10)
    q, k, v = (torch.randn(tokens, heads, 32) for heads in (2, 1, 1))
    norm = torch.ones(1, 32), torch.zeros(1, 32)
    hidden, lm_head, labels = torch.randn(tokens, 8), torch.randn(12, 8), torch.arange(tokens) % 12
    rows = ((labels >= 2) & (labels < 10)).nonzero()[:, 0]
    row_keys = torch.zeros(tokens, 2, dtype=torch.int64)
    trained = [x.clone().requires_grad_() for x in (q, k, v, hidden, lm_head)]

    def rope(q, k):
        return lk.mm_rope(q, k, layout.positions, q_norm=norm, k_norm=norm)

    def attention(q, k, v):
        return lk.frame_attention(q, k, v, layout.limits)

    def loss(hidden, lm_head, **options):
        return lk.tube_masked_loss(hidden, lm_head, labels, classes=classes, rows=rows, **options)

    def sample():
        return lk.masked_sample(hidden, None, lm_head, classes=classes, row_keys=row_keys)

    def backward(call, *leaves):
        def step():
            out = call(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])

        return step

    tq, tk, tv, thidden, tlm_head = trained
    return {
        "frame_layout": lambda: lk.FrameLayout.from_tokens(ids),
        "mm_rope forward": lambda: rope(q, k),
        "mm_rope forward+backward": backward(rope, tq, tk),
        "frame_attention forward": lambda: attention(q, k, v),
        "frame_attention forward+backward": backward(attention, tq, tk, tv),
        "tube_masked_loss forward": lambda: loss(hidden, lm_head),
        "tube_masked_loss forward+backward": backward(loss, thidden, tlm_head),
        "tube_masked_loss none forward+backward": backward(
            lambda hidden, lm_head: loss(hidden, lm_head, reduction="none"), thidden, tlm_head
        ),
        "masked_sample": sample,
    }


def measure() -> dict[str, float]:
    """Return the microseconds of one call of each case: the median over the batches."""
    import torch

    torch.set_num_threads(1)
    result = {}
    for name, call in cases().items():
        times = []
        for _ in range(BATCHES + 1):
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - started) / CALLS * 1e6)
        result[name] = statistics.median(times[1:])  # the first batch warms up
    return result


def run(checkout: Path) -> dict[str, float]:
    """Measure in a fresh process that finds the packages in `checkout`; the cases are those of this file."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    done = subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to measure in turn with this one")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each checkout (default 7)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure()))
        return
    here = Path(__file__).resolve().parents[1]
    checkouts = [here] if options.against is None else [here, options.against.resolve()]
    rounds = [[run(checkout) for checkout in checkouts] for _ in range(options.rounds)]
    print("| call | here, us |" + (" there, us | here / there |" if options.against else ""))
    print("|---|---|" + ("---|---|" if options.against else ""))
    for name in rounds[0][0]:
        figures = [statistics.median(row[i][name] for row in rounds) for i in range(len(checkouts))]
        cells = [f"{figure:.1f}" for figure in figures]
        if options.against:
            cells.append(f"{statistics.median(row[0][name] / row[1][name] for row in rounds):.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
