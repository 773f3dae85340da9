"""Which adapters belong to a model, and how one is taken out of it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapter.config import FacTConfig
from ..adapter.validation import FACTORS
from ..architecture.linears import replace_everywhere
from ..architecture.multihead import close_attentions
from ..upstream import ModulesToSaveWrapper, activate_heads
from .factors import FacTLayer, FacTStack, SharedFactors, remove_factors
from .head import FacTHead
from .layer import FacTLinear


def base_of(model: nn.Module) -> nn.Module:
    """The model that adapters are injected into."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def own_factors(model: nn.Module) -> SharedFactors:
    """The factors registered on `model` itself, not those of adapted models inside it; empty if there are none."""
    factors = getattr(base_of(model), FACTORS, None)  # perhaps the model's own
    return factors if isinstance(factors, SharedFactors) else SharedFactors()


def own_stacks(model: nn.Module) -> list[FacTStack]:
    """The stacks in `own_factors`."""
    return list(own_factors(model).values())  # type: ignore[arg-type]


def adapter_config(model: nn.Module, adapter_name: str) -> FacTConfig | None:
    """The config of the adapter of this name that `model` has factors of, if there is one."""
    return own_factors(model).configs.get(adapter_name)


def forget(model: nn.Module, adapter_name: str) -> None:
    """Drop an adapter of `model`: from its layers, its heads and its stacks, which stay where they are.

    Adapters of models inside this one, and of other methods, stay.
    """
    stacks, config = own_stacks(model), adapter_config(model, adapter_name)
    for module in list(model.modules()):
        if isinstance(module, FacTLinear) and module.fact_stacks.get(adapter_name) in stacks:
            module.forget(adapter_name)
        elif isinstance(module, FacTHead) and module.configs.get(adapter_name) is config is not None:
            others = [name for name in module.active_adapters if name != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=others)
    for stack in stacks:
        stack.forget(adapter_name)
    factors = own_factors(model)
    for name in [name for name, stack in factors.items() if not stack.fact_U]:
        del factors[name]


def discard(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of an adapter: the model keeps no wrapper that none of its other adapters needs."""
    base = base_of(model)
    forget(base, adapter_name)
    replacements: dict[nn.Module, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, FacTLinear) and not module.fact_slices:
            replacements[module] = module.base_layer
        elif isinstance(module, FacTHead) and not module.modules_to_save:
            replacements[module] = module.original_module
    replace_everywhere(base, replacements)
    if not own_factors(base):
        remove_factors(base)
    if not any(isinstance(module, FacTLinear) for module in base.modules()):
        close_attentions(base)


@contextmanager
def undone_on_failure(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> Iterator[set[nn.Module]]:
    """Undo the injection of an adapter if the block raises; gives the heads that are wrapped when it begins."""
    heads = {module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield heads
    except Exception:
        discard(model, adapter_name)
        new = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper) and module not in heads]
        replace_everywhere(model, {head: head.original_module for head in new})
        configs.pop(adapter_name, None)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def undo_awaiting(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of a saved adapter whose numbers are refused; one that has its numbers stays."""
    waiting = [stack for stack in own_stacks(model) if adapter_name in stack.unloaded]
    if not waiting:
        return
    trained, configs = waiting[0].unloaded[adapter_name], getattr(model, "peft_config", {})
    discard(model, adapter_name)
    configs.pop(adapter_name, None)
    for parameter in trained:
        parameter.requires_grad_(True)


def activate(model: nn.Module, adapter_names: list[str]) -> None:
    """Make these the active adapters of every layer and head."""
    for module in model.modules():
        if isinstance(module, FacTLayer):
            module.set_adapter(adapter_names)
    if adapter_names:
        activate_heads(model, adapter_names)
