"""The way to the model inside what other libraries put around it: FSDP, DDP, torch.compile, peft, averages."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lumos.model import Lumos

# DDP, FSDP1 and averaged models; activation checkpointing; torch.compile.
_INSIDE = ("module", "_checkpoint_wrapped_module", "_orig_mod")


def unwrap(module: Any) -> Any:
    """Return the module inside FSDP, DDP, activation checkpointing, torch.compile, peft and averages of weights.

    Adapters that peft put inside the model stay where they are.
    """
    if (inner := _inside_peft(module)) is not None:
        return unwrap(inner)
    for name in _INSIDE:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return module


def unwrap_lumos(model: nn.Module) -> Lumos:
    """Return the Lumos inside `model`, with whole weights, as sampling needs it: it calls parts of the model.

    Raises ValueError for another model, for one whose weights are sharded, and for peft's prompt learning, which acts
    outside the model.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        config = module.active_peft_config if hasattr(type(module), "active_peft_config") else None
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"model must not depend on peft's prompt learning to sample, got {type(config).__name__}")
    inside = unwrap(model)
    if not isinstance(inside, Lumos):
        raise ValueError(
            f"model must be a Lumos, or one inside peft, DDP or torch.compile; got {type(model).__name__}"
            + (f" around {type(inside).__name__}" if inside is not model else "")
        )
    sharded = next((name for name, weight in inside.named_parameters() if hasattr(weight, "placements")), None)
    if sharded is None and any("_fsdp_wrapped_module" in module._modules for module in (model, *inside.modules())):
        sharded = "the weights"
    if sharded is not None:
        raise ValueError(
            f"model must have whole weights to sample, but {sharded} is sharded over processes: gather the weights "
            "first (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
    return inside


def _inside_peft(module: Any) -> nn.Module | None:
    """The model that a PeftModel or a tuner of peft holds; None for anything else."""
    peft = sys.modules.get("peft")  # whoever has such a model has imported it
    if peft is None:
        return None
    if isinstance(module, peft.PeftModel):
        return module.get_base_model()
    if isinstance(module, peft.PeftMixedModel):
        return module.base_model
    return module.model if isinstance(module, peft.tuners.tuners_utils.BaseTuner) else None
