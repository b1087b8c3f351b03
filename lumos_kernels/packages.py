"""The mechanism by which an op's function and its package live under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def share_namespace(function: Callable[..., Any], package: str) -> None:
    """Make the modules of `package` attributes of `function`, those that are imported later too.

    lumos_kernels.mm_rope is the function, and the import system knows a package by the same name. `import
    lumos_kernels.mm_rope.native as x` imports the module, then takes the attribute `mm_rope` of lumos_kernels and the
    attribute `native` of that: it looks for the module on the function.

    Functions and modules both keep their attributes in a dictionary, and that of a function may be replaced. So the
    function takes the package's dictionary. When the import system binds a submodule on the package, the function has
    it as well. What makes the function a function (its code, name, docstring, defaults) is stored elsewhere.
    """
    function.__dict__ = vars(sys.modules[package])
