"""Names for what the parameters of a Triton kernel are: `import kernel_types as kt`, then `tile: kt.Block`.

Triton's compiler traces a kernel and knows the types itself. To Python, and so to mypy, each of them is Any. Kernels
name them through the module, because Triton resolves annotations and admits no other global name in them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Pointer: TypeAlias = Any  # to the first element of a tensor
Descriptor: TypeAlias = Any  # a host tensor descriptor, or a pointer where a configuration takes none
Scalar: TypeAlias = Any  # a number that is the same for the whole program
Block: TypeAlias = Any  # a tensor of the program, in registers or shared memory
Struct: TypeAlias = Any  # a NamedTuple of the above
