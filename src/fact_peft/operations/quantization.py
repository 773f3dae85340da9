"""The numbers of an adapter in a model as its file in few bits will have them."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.config import fact_config


@torch.no_grad()
def quantize_adapter(
    model: nn.Module, storage: str | None, head_storage: str | None = None, adapter_name: str = "default"
) -> None:
    """Round an adapter in place to what is saved in a storage, and have it be saved so.

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
