"""What `import lumos_kernels` does in a fresh process: nothing but define names."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import lumos_kernels

PACKAGE = Path(lumos_kernels.__file__).parent


def run_fresh(tmp_path, script, path=PACKAGE.parent):
    """Runs the script in a new interpreter that finds the package under `path`; its output, or its failure."""
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LUMOS_", "TRITON_", "PYTHON"))}
    env |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "3"}  # a number of threads that nobody would set by accident
    result = subprocess.run([sys.executable, file], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_import_probes_nothing_changes_nothing_and_is_quick(tmp_path):
    run_fresh(
        tmp_path,
        """
        import logging, os, random, signal, sys, threading, time, warnings
        started = time.perf_counter()
        import torch
        torch_seconds = time.perf_counter() - started

        def state():
            return {
                "default dtype": torch.get_default_dtype(),
                "default device": torch.get_default_device(),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
                "gradients": (torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_inference_mode_enabled()),
                "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
                "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
                "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
                "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
                "generators": (hash(random.getstate()), hash(tuple(torch.get_rng_state().tolist()))),
                "environment": dict(os.environ),
                "search path": list(sys.path),
                "warnings": list(warnings.filters),
                "logging": (list(logging.root.handlers), logging.root.level, logging.lastResort),
                "logger": [logging.getLogger("lumos_kernels").handlers, logging.getLogger("lumos_kernels").level],
                "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
                "hooks": (sys.excepthook, sys.displayhook, sys.breakpointhook),
                "printing": str(torch._tensor_str.PRINT_OPTS),
                "patches": [torch.empty, torch.Tensor.to, torch.nn.Linear.forward],
            }

        def forbidden(event, arguments):
            if watching and event.startswith(("ctypes.", "subprocess.", "socket.", "os.system", "os.putenv")):
                probes.append((event, arguments))

        probes, watching = [], False
        sys.addaudithook(forbidden)
        for name in ("is_available", "device_count", "get_device_capability", "current_device", "_lazy_init"):
            setattr(torch.cuda, name, lambda *_, name=name: probes.append(name))
        torch.ops.load_library = lambda path: probes.append(path)

        before, modules, watching = state(), set(sys.modules), True
        started = time.perf_counter()
        import lumos_kernels
        seconds = time.perf_counter() - started
        watching = False

        assert not probes, probes
        after = state()
        assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        imported = {name.split(".")[0] for name in set(sys.modules) - modules}
        assert not imported & {"triton", "lumos", "numpy", "flash_attn"}, imported
        assert "lumos_kernels._host" not in sys.modules
        ours = [name.rsplit(".", 1)[1] for name in sys.modules if name.startswith("lumos_kernels.")]
        assert not {"native", "triton", "cuda", "flash"} & set(ours), ours
        assert seconds < torch_seconds / 2, (seconds, torch_seconds)
        """,
    )


def test_reference_runs_without_triton_without_the_compiled_library_and_without_lumos(tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(PACKAGE, bare / "lumos_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    output = run_fresh(
        tmp_path,
        """
        import sys
        sys.modules["triton"] = None  # importing it raises
        sys.modules["lumos"] = None
        import torch
        import lumos_kernels as lk
        from lumos_kernels import library

        layout = lk.FrameLayout.from_segments([[lk.Text(5), lk.Frame(4, 4)]])
        q = torch.randn(layout.num_tokens, 4, 32, requires_grad=True)
        k, v = torch.randn(2, layout.num_tokens, 2, 32)
        lm_head = torch.randn(50, 128)
        hidden = lk.frame_attention(*lk.mm_rope(q, k, layout.positions), v, layout.limits).flatten(1)
        labels = torch.arange(layout.num_tokens)
        lk.tube_masked_loss(hidden, lm_head, labels, classes=(10, 50)).backward()
        assert q.grad.isfinite().all() and q.grad.any()
        ids, _ = lk.masked_sample(hidden.detach(), None, lm_head, classes=(10, 50))
        assert ((ids >= 10) & (ids < 50)).all()

        for impl, reason in {"native": "the compiled library is not installed", "triton": "not installed"}.items():
            try:
                lk.mm_rope(q, k, layout.positions, impl=impl)
            except ValueError as error:
                assert reason in str(error), error
            else:
                raise AssertionError(f"{impl} ran")
        assert library.isas() == ()
        assert lk.__file__.startswith(sys.argv[0].removesuffix("script.py")), lk.__file__
        lk.backends()
        """,
        path=bare,
    )
    rows = [line.split(maxsplit=4) for line in output.splitlines()]
    assert ["mm_rope", "reference", "cpu", "auto"] in rows
    reasons = {row[1]: row[4] for row in rows if row[0] == "mm_rope" and row[3] == "-"}
    assert reasons["triton"] == "triton is not installed"
    assert reasons["native"].startswith("the compiled library is not installed")


def test_first_call_of_a_process_may_be_compiled(tmp_path):
    """No cache, lazy import or registration of the ops needs an eager call first, or leaves fake tensors behind."""
    run_fresh(
        tmp_path,
        """
        import torch
        import lumos_kernels as lk

        def step(q, k, v, lm_head, layout, labels):
            hidden = lk.frame_attention(*lk.mm_rope(q, k, layout.positions), v, layout.limits).flatten(1)
            loss = lk.tube_masked_loss(hidden, lm_head, labels, classes=(10, 50))
            return loss, lk.masked_sample(hidden, None, lm_head, classes=(10, 50), greedy=True)[0]

        layout = lk.FrameLayout.from_segments([[lk.Text(5), lk.Frame(4, 4)]])
        q, k, v = (torch.randn(layout.num_tokens, heads, 32) for heads in (4, 2, 2))
        lm_head, labels = torch.randn(50, 128), torch.arange(layout.num_tokens)

        def run(function):
            leaf = q.clone().requires_grad_()
            loss, ids = function(leaf, k, v, lm_head, layout, labels)
            loss.backward()
            return loss.detach(), ids, leaf.grad

        compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
        for ours, eager in zip(compiled, run(step), strict=True):
            assert torch.equal(ours, eager)
        """,
    )


def test_every_module_of_an_op_is_imported_by_its_dotted_name(tmp_path):
    """An op's function has the name of its package. `import package.op.module as x` and mock.patch reach the module all
    the same (lumos_kernels/packages.py), whichever of the two is looked at first.
    """
    run_fresh(
        tmp_path,
        """
        import importlib, inspect, pickle, pkgutil, sys
        from unittest import mock

        import lumos_kernels
        import lumos_kernels.masked_sample.contract as contract  # before any other look at the package
        assert contract is sys.modules["lumos_kernels.masked_sample.contract"]

        for op in ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample", "frame_layout"):
            package = sys.modules[f"lumos_kernels.{op}"]
            modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
            assert {"api", "contract", "ops", "reference", "native"} <= set(modules), (op, modules)
            for module in modules:
                name = f"lumos_kernels.{op}.{module}"
                try:
                    exec(f"import {name} as x")
                except ImportError as error:
                    assert error.name == "triton", error
                    continue
                assert x is importlib.import_module(name) is sys.modules[name]
                assert eval(name) is x
            with mock.patch(f"lumos_kernels.{op}.reference.forward", None):
                assert sys.modules[f"lumos_kernels.{op}.reference"].forward is None

        import lumos_kernels.frame_attention.triton.configs as configs
        assert configs is sys.modules["lumos_kernels.frame_attention.triton.configs"]

        for op in ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample"):
            function = getattr(lumos_kernels, op)
            assert inspect.isfunction(function) and function.__name__ == function.__qualname__ == op
            assert function.__module__ == f"lumos_kernels.{op}.api" and "Raises:" in function.__doc__
            assert list(inspect.signature(function).parameters)[-1] == "impl"
            assert pickle.loads(pickle.dumps(function)) is function
        """,
    )
