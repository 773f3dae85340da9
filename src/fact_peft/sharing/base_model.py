"""The base model that a saved adapter names: its name, its class, and the model itself, of transformers or timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..adapter.config import FacTConfig
from ..adapter.names import is_hub_id, mark_local_folder
from ..architecture.heads import label_settings
from .image_processor import read_model_args


def is_timm(config: FacTConfig) -> bool:
    """Whether the adapter was trained on a timm model."""
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    return str(mapping.get("parent_library")).startswith("timm.")


def name_of_timm_model(model: nn.Module) -> tuple[str | None, str | None]:
    """Where a timm model was loaded from: its Hub id or local folder, and its revision; None if this is not known."""
    source = getattr(model, "pretrained_cfg", {})
    if source.get("file"):
        return mark_local_folder(str(source["file"])), None
    name, _, revision = (source.get("hf_hub_id") or "").partition("@")
    return name or None, revision or None


def base_class(config: FacTConfig) -> Any:
    """The class the adapter was trained on, if transformers has it; else ``AutoModelForImageClassification``."""
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    found = getattr(transformers, str(mapping.get("base_model_class")), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return AutoModelForImageClassification


def timm_arguments(config: FacTConfig, folder: Path) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds the model that the adapter in `folder` was trained on."""
    return {**read_model_args(folder), **({"num_classes": len(config.labels)} if config.labels else {})}


def load_base(config: FacTConfig, folder: Path, base_model: str | Path | None, token: str | bool | None) -> Any:
    """Load the base model, with the adapter's labels as its outputs.

    Args:
        config: Config of the adapter.
        folder: Where the adapter lies.
        base_model: Name or folder to take in place of what the config says.
        token: Hub token. timm takes none; it uses the one that the user is logged in with.

    Raises:
        ValueError: If neither `base_model` nor the config names a model, or it is neither a folder here nor a Hub id.
    """
    name = str(base_model or config.base_model_name_or_path or "")
    given = f"a Hub id, a folder, or a loaded {'timm' if is_timm(config) else 'transformers'} model"
    if not name:
        raise ValueError(
            "The adapter does not say which base model it belongs to (base_model_name_or_path is empty in its "
            f"adapter_config.json); pass base_model=, {given}."
        )
    if not Path(name).exists() and not is_hub_id(name):
        raise ValueError(f"The base model is not found at {name!r}; pass base_model=, {given}.")
    revision = None if base_model else config.revision
    if is_timm(config):
        import timm  # not every user of the package has it

        source = f"local-dir:{name}" if Path(name).exists() else f"hf-hub:{name}{f'@{revision}' if revision else ''}"
        return timm.create_model(source, pretrained=True, **timm_arguments(config, folder))
    # A head of another size is replaced by a new one, and that by the adapter's.
    head = {**label_settings(config.labels), "ignore_mismatched_sizes": True} if config.labels else {}
    return base_class(config).from_pretrained(name, revision=revision, token=token, **head)
