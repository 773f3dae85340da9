"""Exchange the numbers of a loaded adapter for those of another one, in place."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from ..tuner.config import FacTConfig, fact_config
from ..tuner.contents import PREFIX
from ..tuner.factors import FacTStack

# What the compiled graph or the meaning of the numbers depends on.
MUST_AGREE = ("rank", "decomposition", "fact_dropout", "share", "layout", "bias", "modules_to_save")


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
) -> None:
    """Replace the factors and heads of a loaded adapter by those of a saved one of the same shape.

    Nothing is created or removed, so a model under ``torch.compile`` is not compiled again. The scale of the loaded
    adapter is part of that graph and stays; a different scale of the saved one is folded into V.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        model_name_or_path: Folder or Hub id of the saved adapter.
        adapter_name: The loaded adapter to overwrite.
        kwargs: Passed on to the Hub download, such as ``revision`` or ``token``.

    Raises:
        ValueError: If the two adapters differ in rank, decomposition, dropout, layers, biases or heads, or the saved
            one is damaged. The loaded adapter is then as it was.
    """
    model = getattr(model, "_orig_mod", model)
    path = os.fspath(model_name_or_path)
    loaded = fact_config(model, adapter_name)
    if PeftConfig._get_peft_type(path, **kwargs) != loaded.peft_type:
        raise ValueError(f"model_name_or_path={path!r} is not a FacT adapter.")
    saved = FacTConfig.from_pretrained(path, **kwargs)
    assert isinstance(saved, FacTConfig)
    for name in MUST_AGREE:
        theirs, ours = getattr(saved, name), getattr(loaded, name)
        if theirs != ours:
            raise ValueError(
                f"{path} has {name}={theirs!r}, but adapter {adapter_name!r} was loaded with {name}={ours!r}; only "
                "adapters of one shape can be swapped in place. Use load_adapter."
            )
    tensors = load_peft_weights(path, device="cpu", **kwargs)
    if not isinstance(model, PeftModel):  # whose heads PEFT looks up by their names in the model
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    loaded.labels, loaded.storage, loaded.head_storage = saved.labels, saved.storage, saved.head_storage
    for stack in model.modules():
        if isinstance(stack, FacTStack) and adapter_name in stack.fact_U:
            stack.fact_V[adapter_name].mul_(saved.scale / loaded.scale)
