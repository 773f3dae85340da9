"""The numbers of a loaded adapter replaced in place: by those of another adapter, or by rounded ones."""

import os
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.config import fact_config
from ..architecture.heads import named_labels
from ..architecture.linears import uncompiled, unwrapped, walk
from ..tuner.lifecycle import kept_if_refused, own_stacks
from ..tuner.planning import named
from ..tuner.refusals import check_complete

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
    model = uncompiled(model)
    loaded, saved = fact_config(model, adapter_name), model_name_or_path
    source = "The saved adapter" if isinstance(saved, Adapter) else saved
    if not isinstance(saved, Adapter):
        saved = Adapter.read(saved, revision, token)
    for name in MUST_AGREE:
        theirs, ours = getattr(saved.config, name), getattr(loaded, name)
        if theirs != ours:
            raise ValueError(
                f"{source} has {name}={theirs!r}, but adapter {adapter_name!r} was loaded with "
                f"{name}={ours!r}; only adapters of one shape can be swapped in place. Use load_adapter."
            )
    check_complete(saved.config, named(loaded.modules_to_save, dict(walk(unwrapped(model)))))
    with kept_if_refused(model, adapter_name):
        saved.fill(model, adapter_name)
    base_config: Any = getattr(unwrapped(model), "config", None)
    if loaded.labels and saved.config.labels and named_labels(unwrapped(model)) == loaded.labels:
        base_config.id2label = dict(enumerate(saved.config.labels))
        base_config.label2id = {label: index for index, label in enumerate(saved.config.labels)}
    loaded.labels, loaded.storage = saved.config.labels, saved.config.storage
    loaded.head_storage = saved.config.head_storage
    for stack in own_stacks(model, adapter_name):
        stack.fact_V[adapter_name].mul_(saved.config.scaling / loaded.scaling)


@torch.no_grad()
def quantize_adapter(
    model: nn.Module, storage: str | None, head_storage: str | None = None, adapter_name: str = "default"
) -> None:
    """Round an adapter in place to the numbers that a storage keeps of it, and set its config to that storage.

    A metric that is measured afterwards is that of the saved file, wherever it is loaded.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        storage: As `FacTConfig.storage`.
        head_storage: As `FacTConfig.head_storage`.
        adapter_name: The adapter to round.

    Raises:
        ValueError: If there is no such adapter or storage, the adapter is merged, or a number does not fit. The adapter
            is then as it was.
    """
    config = fact_config(model, adapter_name)
    adapter = Adapter.of(model, adapter_name).replace(storage=storage, head_storage=head_storage)
    Adapter.from_state_dict(adapter.config, adapter.stored()).fill(model, adapter_name)
    config.storage, config.head_storage = storage, head_storage
