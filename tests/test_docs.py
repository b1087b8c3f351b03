"""The documents keep their word: promised tests exist, README's code runs, relative links lead somewhere."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
OPS = ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample")


def names_in(file: str) -> list[str]:
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if str(path).endswith(f"/{file}")]
    assert found, f"docs/promises.md names {file}, which does not exist"
    return re.findall(r"^def (test_\w+)", found[0].read_text(encoding="utf-8"), re.MULTILINE)


def promised() -> list[tuple[str, str]]:
    """(file, test) of every name in promises.md; a name without a file belongs to the file named before it."""
    pairs, file = [], None
    for name in re.findall(r"`([^`]*test_[^`]*)`", PROMISES):
        if "/" in name and name.endswith("/"):
            continue
        path, _, test = name.rpartition("::") if "::" in name else (name, "", "") if ".py" in name else (file, "", name)
        file = path.removeprefix("tests/")
        pairs.append((file, test))
    return pairs


@pytest.mark.parametrize(("file", "test"), promised())
def test_promised_tests_exist(file, test):
    ops = OPS if "<op>" in file else ("",)
    names = [name for op in ops for name in names_in(file.replace("<op>", op))]
    assert not test or fnmatch.filter(names, test), f"{file} has no {test}"


def test_the_first_python_block_of_the_readme_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert "frame_attention" in capsys.readouterr().out


def test_relative_links_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
