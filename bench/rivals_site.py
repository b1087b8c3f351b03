"""The folder into which `tools/rivals.py unpack --site DIR` puts the rivals, and the environment that imports them.

Only the process that times rivals may import them. With FlashAttention-4 on the path of a whole run, impl="flash" joins
the tests and the sanitizer, fails there and costs minutes of compilation. So DIR is no part of the run's PYTHONPATH:
`python -m bench.gpu_suite --rivals-site DIR` starts that one process with environment(DIR).

The standard library is enough for this file, because tools/rivals.py imports it on a bare machine.
"""

from __future__ import annotations

import os
from pathlib import Path

# Folders that a .pth file of the wheels would add: entries of PYTHONPATH process none.
EXTRA_PATHS = ("nvidia_cutlass_dsl/dsl_packages",)


def packages(site: Path) -> Path:
    """Return the folder of the packages. QuACK takes only what lies below a folder of this name for installed code, and
    refuses to be imported with a nvidia-cutlass-dsl that lies elsewhere.
    """
    return site.resolve() / "site-packages"


def paths(site: Path) -> list[Path]:
    """Return the entries of sys.path that the packages need; none where nothing was unpacked."""
    folder = packages(site)
    return [path for path in (folder, *(folder / extra for extra in EXTRA_PATHS)) if path.is_dir()]


def environment(site: Path) -> dict[str, str]:
    """Return {"PYTHONPATH": ...}, the packages before what the variable holds here: for subprocess's env."""
    present = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*map(str, paths(site)), *([present] if present else [])])}
