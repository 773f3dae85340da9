"""The numbers of an adapter in a model as its file in few bits will have them."""

from __future__ import annotations

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..tuner.config import fact_config, stored_as


@torch.no_grad()
def quantize_adapter(
    model: nn.Module, storage: str | None, head_storage: str | None = None, adapter_name: str = "default"
) -> None:
    """Round an adapter in place to what is saved in a storage, and have it be saved so.

    What is measured afterwards is what a file gives that is saved then, and loaded anywhere.

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
    with stored_as(config, storage, head_storage):
        stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
        set_peft_model_state_dict(model, stored, adapter_name=adapter_name)
    config.storage, config.head_storage = storage, head_storage
