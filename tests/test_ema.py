"""lumos/train/ema.py: the average is torch's, leaves skipped steps out, is kept and exported by runs."""

import pytest
import torch
from host_syncs import NoHostSync
from test_train import folder, small_config, tiny_preset  # noqa: F401
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lumos import Lumos
from lumos.train import TrainConfig, Trainer
from lumos.train.ema import WeightAverage
from lumos.train.export import export

NO, YES = torch.tensor(False), torch.tensor(True)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))


def move(weights):
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(torch.randn_like(p))


def test_it_is_torchs_average_bit_for_bit():
    weights = model()
    average = WeightAverage(weights, 0.9)
    want = [p.detach().clone() for p in weights.parameters()]
    update = get_ema_multi_avg_fn(0.9)
    for _ in range(5):
        move(weights)
        average.update(NO)
        update(want, list(weights.parameters()), None)
    assert all(map(torch.equal, average.state_dict().values(), want))
    assert not torch.equal(want[0], weights[0].weight)


def test_a_skipped_step_changes_no_bit():
    weights = model()
    average = WeightAverage(weights, 0.5)
    move(weights)
    before = [x.clone() for x in average.state_dict().values()]
    average.update(YES)
    assert all(map(torch.equal, average.state_dict().values(), before))
    average.update(NO)
    assert not torch.equal(average.state_dict()["0.weight"], before[0])


def test_the_host_never_waits():
    weights = model()
    average = WeightAverage(weights, 0.5)
    with NoHostSync():
        average.update(YES)


def test_the_average_is_in_the_model_inside_and_its_own_weights_behind():
    weights = model()
    average = WeightAverage(weights, 0.5)
    move(weights)
    own = weights[0].weight.detach().clone()
    mean = average.state_dict()["0.weight"].clone()

    def fail_inside():
        with average.in_model():
            assert torch.equal(weights[0].weight, mean)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(weights[0].weight, own)
    assert torch.equal(average.state_dict()["0.weight"], mean)


def test_only_trained_weights_are_averaged_and_the_state_goes_there_and_back():
    weights = model()
    weights[0].requires_grad_(False)
    average = WeightAverage(weights, 0.5)
    assert list(average.state_dict()) == ["1.weight", "1.bias"]
    move(weights)
    state = {name: tensor.clone() + 1 for name, tensor in average.state_dict().items()}
    average.load_state_dict(state)
    assert all(map(torch.equal, average.state_dict().values(), state.values()))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        WeightAverage(model(), decay)


# In a run


def run(folder, out, **options):  # noqa: F811
    config = TrainConfig(data=(str(folder),), out=str(out), lr=1e-2, warmup=0, ema=0.5, log_every=1, **options)
    trainer = Trainer(config, progress=False)
    trainer.run()
    return trainer


def exported(out):
    return Lumos.from_pretrained(out / "checkpoint").state_dict()


def test_a_run_exports_the_average_of_its_steps(folder, tmp_path, tiny_preset):  # noqa: F811
    means = None
    for steps in range(1, 4):  # the same run, three lengths: its weights after each step
        last = exported_weights(folder, tmp_path / f"last{steps}", steps=steps, export_weights="last")
        if means is None:
            torch.manual_seed(0)
            means = {name: p.detach().clone() for name, p in Lumos(small_config()).named_parameters()}
        means = {name: mean.lerp(last[name], 0.5) for name, mean in means.items()}
    average = exported_weights(folder, tmp_path / "average", steps=3)
    for name, mean in means.items():
        assert torch.equal(average[name], mean), name
    assert not torch.equal(average["lm_head.weight"], last["lm_head.weight"])


def exported_weights(folder, out, **options):  # noqa: F811
    run(folder, out, **options)
    return exported(out)


def test_a_resumed_run_goes_on_with_its_average(folder, tmp_path, tiny_preset):  # noqa: F811
    whole = exported_weights(folder, tmp_path / "whole", steps=4)
    run(folder, tmp_path / "parts", steps=2)
    parts = exported_weights(folder, tmp_path / "parts", steps=4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_the_state_exports_its_average(folder, tmp_path, tiny_preset):  # noqa: F811
    run(folder, tmp_path / "run", steps=2)
    export(tmp_path / "run", tmp_path / "again")
    again, average = Lumos.from_pretrained(tmp_path / "again").state_dict(), exported(tmp_path / "run")
    assert all(torch.equal(again[name], average[name]) for name in average)
