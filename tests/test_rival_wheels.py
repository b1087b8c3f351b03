"""The other libraries' wheels travel in folders below a call's limit, and the standard library unpacks them."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import rivals_site

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def commands():
    spec = importlib.util.spec_from_file_location("gpu_commands_tool", ROOT / "tools" / "gpu_commands.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool(commands):
    return commands.rivals


def wheel(folder, name, files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def wheels(tmp_path):
    large = bytes(torch.randint(0, 256, (9000,), generator=torch.Generator().manual_seed(0)).tolist())
    small = wheel(tmp_path, "small", {"small/__init__.py": b"x = 1\n"})
    return [wheel(tmp_path, "large", {"large/lib.so": large, "large/a/b.py": b"y = 2\n"}), small], large


def test_wheels_travel_in_folders_below_the_limit(tool, wheels, tmp_path):
    paths, large = wheels
    folders = tool.pack(paths, tmp_path / "out", limit=4000)
    assert len(folders) > 1
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= 4000 for folder in folders)
    assert (folders[0] / "small-1.0-py3-none-any.whl").exists()

    site = tmp_path / "site"
    for number, folder in enumerate(folders):  # one call to the machine after the other
        waiting = tool.unpack([folder], site)
        assert (site / "small" / "__init__.py").read_text() == "x = 1\n"
        assert bool(waiting) == (number < len(folders) - 1)
        assert (site / "large" / "lib.so").exists() != bool(waiting)
    assert (site / "large" / "lib.so").read_bytes() == large
    assert (site / "large" / "a" / "b.py").read_bytes() == b"y = 2\n"
    assert not list((site / ".pieces").iterdir())


def test_pieces_fill_the_folders_and_a_second_packing_leaves_none_of_the_first(tool, wheels, tmp_path):
    out = tmp_path / "out"
    assert len(tool.pack(wheels[0], out, limit=3000)) == 4
    folders = tool.pack(wheels[0], out, limit=5000)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert len(folders) == 2
    assert sizes[0] == 5000, sizes
    assert not any((out / "4").iterdir())
    assert tool.folders(out) == folders


def test_the_tree_that_travels_is_what_git_tracks_and_what_it_does_not_ignore(tool, tmp_path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x")
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name, size in ((".gitignore", 0), ("tracked", 10), ("deleted", 50), ("untracked", 200), ("ignored", 4000)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("ignored\n")
    subprocess.run([*git, "add", "tracked", "deleted", ".gitignore"], check=True)
    (tmp_path / "deleted").unlink()
    assert tool.tree_bytes(tmp_path) == 10 + 200 + len("ignored\n")


def test_download_leaves_room_for_the_tree(tool, wheels, tmp_path, monkeypatch, capsys):
    limits = []
    monkeypatch.setattr(tool, "download", lambda folder: wheels[0])
    monkeypatch.setattr(tool, "tree_bytes", lambda: 10 * tool.MIB)
    monkeypatch.setattr(tool, "pack", lambda wheels, out, limit: limits.append(limit) or [])
    assert tool.main(["download", "--out", str(tmp_path)]) == 0
    assert tool.main(["download", "--out", str(tmp_path), "--limit", "20"]) == 0
    assert limits == [50 * tool.MIB, 6 * tool.MIB], "64 MiB or --limit, less the tree, headers and growth"
    assert tool.main(["download", "--out", str(tmp_path), "--limit", "14.5"]) == 1
    assert "leaves no room" in capsys.readouterr().err


def test_unpack_needs_the_standard_library_alone_and_says_what_is_incomplete(tool, wheels, tmp_path):
    folders = tool.pack(wheels[0], tmp_path / "out", limit=4000)
    site = tmp_path / "site"

    def unpack(folder):
        command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "rivals.py")]  # no installed package is visible
        command += ["unpack", "--site", str(site), str(folder)]
        return subprocess.run(command, check=True, capture_output=True, text=True)

    first = unpack(folders[0])
    packages = site / "site-packages"  # the name counts: QuACK looks for it
    assert (packages / "small" / "__init__.py").exists()
    assert "incomplete: large-1.0-py3-none-any.whl: pieces [0] of" in first.stderr
    assert first.stdout.splitlines()[-1] == f"PYTHONPATH={packages}"
    assert "export" not in first.stdout, "the path is for the process that times rivals alone"
    for folder in folders[1:]:
        last = unpack(folder)
    assert not last.stderr
    assert (packages / "large" / "lib.so").read_bytes() == wheels[1]


def test_the_site_gives_one_process_its_path(tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    monkeypatch.setenv("PYTHONPATH", "/before")
    assert rivals_site.environment(tmp_path) == {"PYTHONPATH": "/before"}, "nothing was unpacked"
    (packages / "nvidia_cutlass_dsl" / "dsl_packages").mkdir(parents=True)
    (packages / "nvidia_cutlass_dsl" / "dsl_packages" / "cutlass_stand_in.py").write_text("")
    expected = f"{packages}:{packages}/nvidia_cutlass_dsl/dsl_packages:/before"
    assert rivals_site.environment(tmp_path) == {"PYTHONPATH": expected}
    imports = [sys.executable, "-c", "import cutlass_stand_in"]
    assert subprocess.run(imports, env=rivals_site.environment(tmp_path)).returncode == 0
    assert subprocess.run(imports, stderr=subprocess.DEVNULL).returncode != 0


def test_wheels_for_another_python_are_named(tool):
    names = ["a-1.0-py3-none-any.whl", "b-1.0-cp312-cp312-manylinux_2_28_x86_64.whl.tar.xz.0of2"]
    names += ["c-1.0-cp310-abi3-manylinux_2_28_x86_64.whl", "notes.txt"]
    assert tool.unfit(names, "3.12") == []
    assert tool.unfit(names, "3.11") == [names[1]]


# The commands of a run


@pytest.fixture
def carried(tool, tmp_path, monkeypatch):
    """A working directory with .whl/1 and .whl/2: every wheel by name, the last one in two pieces."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        (tmp_path / ".whl" / str(number)).mkdir(parents=True)
    names = [f"{wheel.replace('-', '_').replace('==', '-')}-py3-none-any.whl" for wheel in tool.WHEELS]
    names[-1] = names[-1].replace("py3-none-any", "cp312-cp312-manylinux_2_28_x86_64")
    for name in names[:-1]:
        (tmp_path / ".whl" / "1" / name).write_bytes(b"x" * 1000)
    for number in (1, 2):
        (tmp_path / ".whl" / str(number) / f"{names[-1]}.tar.xz.{number - 1}of2").write_bytes(b"x" * tool.MIB)
    return tmp_path / ".whl"


@pytest.fixture
def clean(commands, tool, monkeypatch):
    """A clean tree of 8 MiB at the commit abc."""
    answers = {"status": "", "rev-parse": "abc"}
    monkeypatch.setattr(commands, "git", lambda *arguments: answers[arguments[0]])
    monkeypatch.setattr(tool, "tree_bytes", lambda: 8 * tool.MIB)
    return answers


def test_the_commands_of_a_run(commands, carried, clean, capsys):
    assert commands.main([]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    expected = [
        "python tools/rivals.py download --out .whl --limit 64",
        "# Call 1: carry .whl/2 (1.0 MiB) and the working tree (8.0 MiB), 9.0 of 64 MiB",
        "python3 tools/rivals.py unpack --site /tmp/rivals .whl/2; "
        'python3 -m bench.gpu_suite --call 1 --seconds 300 --out "$OUT" --commit abc; code=$?; '
        'mkdir -p /tmp/gpu-suite-1 && cp -r "$OUT"/. /tmp/gpu-suite-1; exit $code',
        "# At most 8 files come back from $OUT: put them into gpu-suite/1.",
        "# Before call 2, if the machine was given back: carry .whl/2 (1.0 MiB) and gpu-suite/1 (0.0 MiB)",
        "python3 tools/rivals.py unpack --site /tmp/rivals .whl/2; "
        "mkdir -p /tmp/gpu-suite-1 && cp -r gpu-suite/1/. /tmp/gpu-suite-1",
        "# Call 2, within half a minute of the last one: carry .whl/1 (1.0 MiB)",
        "python3 tools/rivals.py unpack --site /tmp/rivals .whl/1; "
        'python3 -m bench.gpu_suite --call 2 --seconds 300 --out "$OUT" --commit abc '
        "--before /tmp/gpu-suite-1 --rivals-site /tmp/rivals",
        "python -m bench.gpu.proof gpu-suite/2/suite.json",
    ]
    lines = iter(printed.out.splitlines())
    for command in expected:
        assert any(line.startswith(command) for line in lines), f"{command!r} is absent or out of order"
    assert all(len(line) <= 2000 for line in printed.out.splitlines())


def test_every_folder_reaches_the_machine_and_only_call_2_imports_them(commands):
    folders = [Path(".whl") / str(number) for number in (1, 2, 3)]
    planned = commands.calls(folders, 300, "abc")
    result = Path("gpu-suite") / "1"
    assert [call.carry for call in planned] == [(folders[2],), (folders[2], result), (folders[1],), (folders[0],)]
    assert [call.command.count("--rivals-site") for call in planned] == [0, 0, 0, 1]
    assert all(f"--site /tmp/rivals {call.carry[0]}" in call.command for call in planned)
    alone = commands.calls(folders[:1], 60, "abc")
    assert [call.carry for call in alone] == [(), (result,), (folders[0],)]


def test_call_1_ends_with_the_code_of_the_suite_and_leaves_its_result_to_call_2(commands, tmp_path, monkeypatch):
    """The commands run in a shell, with another suite in place of ours and another folder in place of /tmp."""
    monkeypatch.setattr(commands, "BEFORE", str(tmp_path / "kept"))
    monkeypatch.setattr(commands, "suite_command", lambda *arguments: '(echo found > "$OUT/suite.json"; exit 3)')
    (tmp_path / "out of call 1").mkdir()
    one, again, _ = commands.calls([Path(".whl/1")], 60, "abc")
    environment = {"OUT": str(tmp_path / "out of call 1"), "PATH": os.environ["PATH"]}
    assert subprocess.run(["bash", "-c", one.command], env=environment, cwd=tmp_path).returncode == 3
    assert (tmp_path / "kept" / "suite.json").read_text() == "found\n"
    (tmp_path / "gpu-suite" / "1").mkdir(parents=True)
    (tmp_path / "gpu-suite" / "1" / "suite.json").write_text("copied here\n")
    subprocess.run(["bash", "-c", again.command], check=True, cwd=tmp_path)
    assert (tmp_path / "kept" / "suite.json").read_text() == "copied here\n"


def test_what_would_fail_a_call_is_said_and_ends_with_1(commands, tool, carried, clean, monkeypatch, capsys):
    def problems(*arguments):
        assert commands.main([*arguments]) == 1
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem: ")]

    assert len(problems("--python", "3.11")) == 2
    [small] = problems("--limit", "10.0005")  # the tree, 1 MiB for headers and 1 MiB of pieces are 10
    assert small == "problem: Call 2, within half a minute of the last one: 10.0 MiB are more than 10.0005"
    clean["status"] = " M lumos_kernels/dispatch.py"
    assert "lumos_kernels/dispatch.py" in problems()[0]
    clean["status"] = ""
    [outside] = problems("--wheels", str(carried))
    assert "must be a path inside the working tree" in outside
    [piece] = carried.glob("2/*")
    piece.rename(carried / "piece")
    [absent] = problems()
    assert absent.startswith(f"problem: {tool.WHEELS[-1]} is not in .whl")
    (carried / "1" / "liger_kernel-0.8.5-py3-none-any.whl").unlink()
    assert len(problems()) == 2
    monkeypatch.setattr(commands, "SITE", "/tmp/" + "x" * 2000)
    assert any("characters" in line for line in problems())
    assert problems("--wheels", "nowhere") == ["problem: nowhere holds no folder of wheels"]


def test_the_script_runs(carried):
    """On the real tree, which may differ from its commit: nothing else is wrong."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_commands.py"], capture_output=True, text=True)
    assert 'python3 -m bench.gpu_suite --call 1 --seconds 300 --out "$OUT" --commit' in done.stdout, done.stderr
    assert all("the working tree differs" in line for line in done.stderr.splitlines())
