"""The tuner of frame_attention's Triton kernels: what it tries, what it takes, and what it writes."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from frame_attention_cases import (
    BF16,
    INTERPRETED,
    SMALL,
    config,
    fields,
    leaves_of,
    measured_as,
)

from lumos_kernels.frame_attention.contract import Inputs
from lumos_kernels.frame_attention.triton import configs, measured, tune
from lumos_kernels.frame_attention.triton.measured import Table

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

FIRST, SECOND = tune.SHAPES[:2]


class Tuning:
    """A run of the tuner with made-up times for configurations, in which no kernel runs."""

    def __init__(self, times: dict, wrong: dict | None = None, todo=None, minutes: float = 1.0, most=None) -> None:
        self.times, self.wrong = times, wrong or {}
        self.lines: list[str] = []
        self.stored: list[Table] = []
        self.tried: list[tuple] = []
        self.current = None
        todo = tune.subjects() if todo is None else todo
        with (
            mock.patch.object(tune, "runner", self._runner),
            mock.patch.object(tune, "make_data", return_value=None),
        ):
            self.found = tune.tune(
                "sm_90", minutes, todo, self.stored.append, most=most, clock=self._clock, report=self.lines.append
            )

    def _runner(self, kernel, data, dkdv=None):
        def run(config):
            def call():
                self.current = kernel, config
                self.tried.append((kernel, config, dkdv))
                if self.wrong.get(config) is not None:
                    raise self.wrong[config]
                return (torch.full((4,), torch.nan if config in self.wrong else 1.0),)

            return call

        return run

    def _clock(self, call) -> float:
        call()
        return self.times.get(self.current, 1.0)


def test_the_tuner_takes_the_fastest_right_configuration():
    subject = tune.Subject("forward", FIRST)
    default, *others = tune.candidates("forward", "sm_90", 64)
    assert len(set(others)) == len(others) > 5
    times = {("forward", c): t for c, t in zip(others, (0.5, 0.6, 0.7, 0.8, 0.99), strict=False)}
    wrong = {others[0]: RuntimeError("out of resource: shared memory\nmore"), others[1]: None}
    run = Tuning(times, wrong, [subject])
    assert run.found == ({("forward", 64): others[2]}, {})
    assert f"    refused {others[0]}: RuntimeError: out of resource: shared memory" in run.lines
    assert f"    refused {others[1]}: wrong result" in run.lines
    # 1 % is not enough to leave the default
    assert Tuning({("forward", others[4]): 0.99}, {}, [subject]).found.configs == {("forward", 64): default}


@pytest.mark.parametrize("seconds", [0.5, 0.99])
def test_the_tuner_fuses_the_backward_where_it_is_faster(seconds):
    todo = [tune.Subject(kernel, SECOND) for kernel in ("dkdv", "dq", "fused")]
    times = {("fused", c): seconds for c in tune.candidates("fused", "sm_90", 128)}
    assert Tuning(times, todo=todo).found.fused == {128: seconds < 0.98}
    assert Tuning(times, todo=todo[2:]).found.fused == {}  # nothing to compare with was measured


def test_dq_is_measured_with_the_best_dk_and_dv():
    todo = [tune.Subject(kernel, SECOND) for kernel in ("dkdv", "dq")]
    best = tune.candidates("dkdv", "sm_90", 128)[1]
    run = Tuning({("dkdv", best): 0.5}, todo=todo)
    assert {dkdv for kernel, _, dkdv in run.tried if kernel == "dq"} == {best}


def test_the_tuner_stores_after_each_subject_and_stops_in_time():
    todo = [tune.Subject(kernel, FIRST) for kernel in ("dkdv", "dq", "fused")]
    run = Tuning({}, todo=todo, most=2)
    assert [len(found.configs) for found in run.stored] == [1, 2, 3]
    assert run.stored[-1] == run.found
    late = Tuning({}, minutes=0.0)
    assert late.found == ({}, {})
    assert late.stored == []
    assert late.lines == ["time is up: 16 of 16 keep their entries"]


def test_a_default_that_fails_keeps_its_entry_and_the_tuner_goes_on():
    todo = [tune.Subject("forward", FIRST), tune.Subject("forward", SECOND)]
    broken, right = (configs.DEFAULTS["forward", "sm_90"][shape.head_dim] for shape in (FIRST, SECOND))
    assert broken != right
    run = Tuning({}, {broken: RuntimeError("ptxas")}, todo=todo, most=1)
    assert list(run.found.configs) == [("forward", SECOND.head_dim)]
    assert run.lines[0] == f"forward D={FIRST.head_dim} keeps its entry: RuntimeError: ptxas"


def test_the_tuner_leaves_a_kernel_when_its_share_of_the_time_is_up():
    found = tune.candidates("forward", "sm_90", 64)
    verdict = tune.decide(lambda config: lambda: (torch.ones(4),), found, deadline=-1.0, clock=lambda call: 1.0)
    assert verdict.config == configs.DEFAULTS["forward", "sm_90"][64]
    assert verdict.tried == 1


def test_few_candidates_are_the_vetted_ones():
    for head_dim in (64, 128):
        for kernel, found in tune.vetted("sm_90", head_dim).items():
            assert 2 <= len(set(found)) == len(found) <= tune.MOST_VETTED
            assert found[0] == configs.DEFAULTS[kernel, "sm_90"][head_dim]
            assert found == tune.candidates(kernel, "sm_90", head_dim, tune.MOST_VETTED)
            assert set(found) <= set(tune.candidates(kernel, "sm_90", head_dim))
    assert {len(found) for found in tune.vetted("sm_80", 96).values()} == {tune.MOST_VETTED}
    tried = {c for _, c, _ in Tuning({}, todo=[tune.Subject("dkdv", FIRST)], most=3).tried}
    assert tried == set(tune.candidates("dkdv", "sm_90", 64)[:3])


def test_the_tuners_module_reads_back_and_keeps_other_entries():
    old = {("dq", "sm_80", 32): fields(64, 32, 4, 2, False), ("dq", "sm_90", 64): fields(64, 64, 4, 2, True)}
    found = Table({("dq", 64): config(128, 128, 8, 2, True)}, {64: True, 128: False})
    with measured_as(old, frozenset([("sm_90", 128), ("sm_80", 128)])):
        text = tune.source("sm_90", found, "Last run: nowhere.")
    read: dict = {}
    exec(text, read)
    assert read["CONFIGS"] == {**old, ("dq", "sm_90", 64): fields(128, 128, 8, 2, True)}
    assert read["FUSED_BACKWARD"] == {("sm_90", 64), ("sm_80", 128)}
    exec(tune.source("sm_90", Table({}, {}), "Nothing."), read)
    assert read["CONFIGS"] == {}


@pytest.fixture
def pretended_gpu(tmp_path, monkeypatch):
    """A machine on which main() finds a GPU, and on which the tuner is interrupted after its first subject."""
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", mock.Mock(return_value=None))
    monkeypatch.setattr(measured, "machine", lambda gpu=None: "GPU A")
    monkeypatch.setattr(configs, "architecture", lambda x: "sm_90")

    def interrupted(arch, minutes, todo, store, **options):
        store(Table({("dq", 64): config(64, 64, 4, 2, True)}, {}))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", interrupted)
    configs.table.cache_clear()
    yield tmp_path
    configs.table.cache_clear()


def test_a_tuner_that_is_killed_leaves_the_users_table_or_the_module(pretended_gpu):
    with contextlib.suppress(KeyboardInterrupt):
        tune.main(["--minutes", "1", "--head-dims", "64"])
    assert configs.table(0, "sm_90").configs == {("dq", 64): config(64, 64, 4, 2, True)}
    measured.path().unlink()
    out = pretended_gpu / "tuned.py"
    with contextlib.suppress(KeyboardInterrupt):
        tune.main(["--out", str(out)])
    assert '("dq", "sm_90", 64): {' in out.read_text()
    assert not measured.path().exists()


def test_the_tuner_runs_the_kernels_it_measures(device):
    """On small inputs: a result of each kernel, in a configuration that is not its default."""
    q, k, v = leaves_of(SMALL, (2, 1), 32, BF16, device)
    data = tune.Data(Inputs(q, k, v, SMALL.to(device), 32**-0.5), torch.randn_like(q))
    default, other = configs.DEFAULTS, config(64, 64, 4, 2, False)
    for kernel in configs.KERNELS:
        dkdv = config(64, 64, 8, 2, False)
        run = tune.runner(kernel, data, dkdv if kernel == "dq" else None)
        with mock.patch.object(configs, "options", wraps=configs.options) as options:
            results = run(other)()
        used = {"dkdv": [other, default["dq", "sm_90"][32]], "dq": [dkdv, other]}.get(kernel, [other])
        assert [call.args[0] for call in options.call_args_list] == used
        assert tune.agrees(results, run(default[kernel, "sm_90"][32])())


def test_a_dry_run_lists_the_candidates(capsys):
    tune.main(["--dry-run", "--arch", "sm_90"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(configs.KERNELS) * len(tune.SHAPES)
    assert lines[0].startswith("forward D=64: ")
    tune.main(["--dry-run", "--head-dims", "64,128", "--candidates", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert {line.split(" candidates")[0][-1] for line in lines} <= {"2", "3"}
