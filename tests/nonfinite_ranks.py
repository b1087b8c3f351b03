"""A run of several processes, one of which meets a document that gives NaN; run by test_nonfinite.py under torchrun."""

import json
import sys
from pathlib import Path

import torch
from test_nonfinite import BAD, batch_of, document, small_model
from torch.distributed.tensor import DTensor

from lumos.parallel import Parallel
from lumos.train import make_optimizer, training_step
from lumos.train.nonfinite import StepGuard, explain


def main(stop: bool, out: Path) -> None:
    parallel = Parallel.start("cpu")
    model = parallel.apply(small_model())
    optimizer = make_optimizer(model, 1e-2, 0.1)
    guard = StepGuard(stop, "cpu")
    # Only the last rank's micro-batch of step 1 is bad.
    bad = parallel.rank == parallel.world_size - 1
    texts = [[50 + parallel.rank], [BAD if bad else 60], [70 + parallel.rank]]
    steps = [[batch_of(document(text))] for text in texts]

    def everything():
        state = [*model.parameters()] + [x for s in optimizer.state.values() for x in s.values()]
        return [(x.to_local() if isinstance(x, DTensor) else x).detach().clone() for x in state]

    skipped, changed = [], []
    for step in steps:
        before = everything()
        stats = training_step(model, optimizer, step, 4.0, parallel=parallel, guard=guard)
        skipped.append(bool(stats.skipped))
        after = everything()
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    said = explain(model, steps[1], [[f"rank {parallel.rank}"]], torch.float32, parallel)
    (out / f"{parallel.rank}.json").write_text(json.dumps({"skipped": skipped, "changed": changed, "said": said}))
    parallel.close()


if __name__ == "__main__":
    main(sys.argv[1] == "stop", Path(sys.argv[2]))
