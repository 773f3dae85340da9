"""One adapter per image of a batch: ``model(pixel_values=..., adapter_names=["a", "b", "__base__"])``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import FacTLinear

BASE = "__base__"  # PEFT's name for no adapter


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the context, the layers and heads of `model` use the named adapter for each image of the batch.

    Raises:
        ValueError: If the model is training or has merged adapters, or a name is unknown.
    """
    layers = [module for module in model.modules() if isinstance(module, FacTLinear)]
    known = {BASE}.union(*(layer.fact_slices for layer in layers))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"adapter_names names {unknown}, but there are only {sorted(known)}.")
    if model.training:
        raise ValueError("adapter_names works in evaluation mode only; call model.eval() first.")
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names does not work while adapters are merged; call unmerge_adapter() first.")

    def pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> Any:
        return args, {**kwargs, "adapter_names": names}

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, FacTLinear):
                names = list(adapter_names)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                names = [name if name in module._get_available_adapters() else BASE for name in adapter_names]
            else:
                continue
            handle = module.register_forward_pre_hook(partial(pass_names, names=names), with_kwargs=True)
            hooks.callback(handle.remove)
        yield
