"""The base model that a saved adapter names: whether others can find it, its class, and the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..adapter.config import FacTConfig
from ..architecture.heads import label_settings


def base_class(config: FacTConfig) -> Any:
    """The class the adapter was trained on, if transformers has it; else ``AutoModelForImageClassification``."""
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    found = getattr(transformers, str(mapping.get("base_model_class")), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return AutoModelForImageClassification


def load_base(config: FacTConfig, base_model: str | Path | None, token: str | bool | None) -> PreTrainedModel:
    """Load the base model, with the adapter's labels as its outputs.

    Args:
        config: Config of the adapter.
        base_model: Name or folder to take in place of what the config says.
        token: Hub token.

    Raises:
        ValueError: If neither `base_model` nor the config names a model.
    """
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(
            "The adapter does not say which base model it belongs to (base_model_name_or_path is empty in its "
            "adapter_config.json); pass base_model=, a Hub id, a folder, or a loaded transformers model."
        )
    # A head of another size is replaced by a new one, and that by the adapter's.
    head = {**label_settings(config.labels), "ignore_mismatched_sizes": True} if config.labels else {}
    revision = None if base_model else config.revision
    return base_class(config).from_pretrained(name, revision=revision, token=token, **head)
