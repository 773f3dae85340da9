"""Exchange the numbers of a loaded adapter for those of another one, in place."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.config import fact_config
from ..tuner.factors import FacTStack

# The fields on which the compiled graph or the meaning of the numbers depends.
MUST_AGREE = ("rank", "decomposition", "fact_dropout", "share", "layout", "bias", "modules_to_save")


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str] | Adapter,
    adapter_name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Replace the factors and heads of a loaded adapter by those of a saved one of the same shape.

    Nothing is created or removed, so a model under ``torch.compile`` is not compiled again. The scale of the loaded
    adapter is part of that graph and stays; a different scale of the saved one is folded into V.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        model_name_or_path: Folder or Hub id of the saved adapter, or the adapter itself.
        adapter_name: The loaded adapter to overwrite.
        revision: Branch, tag or commit of the repository on the Hub.
        token: Hub token.

    Raises:
        ValueError: If the two adapters differ in rank, decomposition, dropout, layers, biases or heads, or the saved
            one is damaged. The loaded adapter is then as it was.
    """
    model = getattr(model, "_orig_mod", model)
    loaded = fact_config(model, adapter_name)
    saved = (
        model_name_or_path
        if isinstance(model_name_or_path, Adapter)
        else Adapter.read(model_name_or_path, revision, token)
    )
    for name in MUST_AGREE:
        theirs, ours = getattr(saved.config, name), getattr(loaded, name)
        if theirs != ours:
            raise ValueError(
                f"{model_name_or_path} has {name}={theirs!r}, but adapter {adapter_name!r} was loaded with "
                f"{name}={ours!r}; only adapters of one shape can be swapped in place. Use load_adapter."
            )
    saved.fill(model, adapter_name)
    loaded.labels, loaded.storage = saved.config.labels, saved.config.storage
    loaded.head_storage = saved.config.head_storage
    for stack in model.modules():
        if isinstance(stack, FacTStack) and adapter_name in stack.fact_U:
            stack.fact_V[adapter_name].mul_(saved.config.scaling / loaded.scaling)
