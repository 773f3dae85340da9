"""Which adapters belong to a model, and how one is taken out of it again."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from ..adapter.config import FacTConfig
from ..adapter.validation import FACTORS
from ..architecture.linears import replace_everywhere
from ..architecture.multihead import close_attentions
from ..upstream import ModulesToSaveWrapper
from .factors import FacTStack, SharedFactors
from .layer import FacTLinear


def own_stacks(model: nn.Module) -> list[FacTStack]:
    """The stacks registered on `model` itself, not those of adapted models inside it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    factors = getattr(base, FACTORS, None)  # perhaps the model's own
    return list(factors.values()) if isinstance(factors, SharedFactors) else []  # type: ignore[arg-type]


def adapter_config(model: nn.Module, adapter_name: str) -> FacTConfig | None:
    """The config of the adapter of this name that `model` has factors of, if there is one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: FacTConfig | None = getattr(base, FACTORS).configs.get(adapter_name) if own_stacks(base) else None
    return config


def is_merged(model: nn.Module, adapter_name: str) -> bool:
    """Whether the increment of an adapter is part of the base weights, so that it must not be changed."""
    return any(adapter_name in stack.merged_adapters for stack in own_stacks(model))


def drop_empty_stacks(model: nn.Module) -> None:
    """Remove the stacks in which no adapter has factors."""
    stacks = getattr(model, FACTORS, {})
    for name in [name for name, stack in stacks.items() if not stack.fact_U]:
        del stacks[name]


def discard(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of an adapter: the model has no more wrappers than it needs for its other adapters."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stacks = own_stacks(base)
    replacements: dict[nn.Module, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, FacTLinear) and module.fact_stacks.get(adapter_name) in stacks:
            module.forget(adapter_name)
            if not module.fact_slices:
                replacements[module] = module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            others = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=others)
            if not module.modules_to_save:
                replacements[module] = module.original_module
    replace_everywhere(base, replacements)
    for stack in stacks:
        stack.forget(adapter_name)
    drop_empty_stacks(base)
    if hasattr(base, FACTORS) and not getattr(base, FACTORS):
        delattr(base, FACTORS)
    if not any(isinstance(module, FacTLinear) for module in base.modules()):
        close_attentions(base)
