"""What the compiled library offers on this CPU (csrc/host.cpp)."""

ISA_VALUES: dict[str, int]  # what the ops of _ops.so take for `isa`
COMPILER: str

def supported_isas() -> list[str]:
    """Instruction sets with compiled kernels that this CPU runs, best first."""

def supported_models() -> list[str]:
    """Instruction sets in software that this CPU runs, for tests."""
