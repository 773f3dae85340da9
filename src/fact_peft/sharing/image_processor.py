"""The image processor of a classifier, saved with the adapter and loaded again.

A timm model has transformers' ``TimmWrapperImageProcessor``. Its file holds timm's data config (input size, mean,
standard deviation, interpolation, crop), and the arguments that ``timm.create_model`` built the model with.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

TIMM_PROCESSOR = "TimmWrapperImageProcessor"


def find_image_processor(image_processor: Any, model: nn.Module) -> Any:
    """What can be saved: `image_processor`, made of timm's data config if that, or None for a timm model, is given.

    Args:
        image_processor: An image processor, a data config of timm, or None.
        model: The base model.

    Raises:
        ValueError: If it is none of these.
    """
    if image_processor is None and getattr(model, "pretrained_cfg", None):
        from timm.data import resolve_input_data_config

        image_processor = resolve_input_data_config(model)
    if isinstance(image_processor, dict):
        return timm_processor(image_processor)
    if not callable(getattr(image_processor, "save_pretrained", None)):
        raise ValueError(
            f"image_processor={image_processor!r} cannot be saved; pass the one that prepares the images of the model, "
            "such as AutoImageProcessor.from_pretrained(base_model), or for a timm model its data config, such as "
            "timm.data.resolve_input_data_config(model)."
        )
    return image_processor


def timm_processor(data_config: Any) -> Any:
    """The image processor of a data config of timm.

    Raises:
        ValueError: If it lacks the input size, the mean or the standard deviation.
    """
    if not isinstance(data_config, dict) or not {"input_size", "mean", "std"} <= data_config.keys():
        raise ValueError(
            f"image_processor={data_config!r} is not a data config of timm, which has input_size, mean and std; pass "
            "what timm.data.resolve_input_data_config(model) returns."
        )
    from transformers import TimmWrapperImageProcessor  # imports timm

    return TimmWrapperImageProcessor(data_config)


def save_image_processor(image_processor: Any, model: nn.Module, folder: Path) -> None:
    """Write ``preprocessor_config.json`` into `folder`.

    Raises:
        ValueError: If a timm model was built with an argument that JSON cannot hold.
    """
    if type(image_processor).__name__ != TIMM_PROCESSOR:
        image_processor.save_pretrained(folder)
        return
    # transformers saves nothing here, since it has these settings in the config of the model.
    settings = {"image_processor_type": TIMM_PROCESSOR, "pretrained_cfg": image_processor.data_config}
    if getattr(model, "pretrained_cfg", None):
        from timm.models import get_model_args

        settings["model_args"] = get_model_args(model)
    try:
        text = json.dumps(settings, indent=2)
    except TypeError as error:
        raise ValueError(
            f"The timm model was built with {settings['model_args']}, which JSON cannot hold ({error}); build it with "
            "names in place of classes and functions, such as act_layer='relu'."
        ) from error
    (folder / IMAGE_PROCESSOR_NAME).write_text(text, encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``preprocessor_config.json`` in `folder` says; empty if there is none."""
    file = folder / IMAGE_PROCESSOR_NAME
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return settings if isinstance(settings, dict) else {}


def read_model_args(folder: Path) -> dict[str, Any]:
    """The arguments that ``timm.create_model`` hands to the model, as saved in `folder`.

    Raises:
        ValueError: If they are no such arguments, but say for example where weights are loaded from.
    """
    import timm

    model_args = read_settings(folder).get("model_args", {})
    if not isinstance(model_args, dict) or model_args.keys() & inspect.signature(timm.create_model).parameters.keys():
        raise ValueError(
            f"model_args={model_args!r} in {folder / IMAGE_PROCESSOR_NAME} are not arguments of a timm model alone; "
            "take the file from where the adapter was saved, or pass base_model=, a loaded timm model."
        )
    return model_args


def load_image_processor(folder: Path, model: Any, **download: Any) -> Any:
    """The image processor saved in `folder`, or else that of the base model.

    Args:
        folder: Where the adapter lies.
        model: The base model.
        download: For ``AutoImageProcessor.from_pretrained`` of the base model.

    Raises:
        ValueError: If there is none, or its file is not one.
    """
    settings = read_settings(folder)
    if settings.get("image_processor_type") == TIMM_PROCESSOR:
        return timm_processor(settings.get("pretrained_cfg"))
    if (folder / IMAGE_PROCESSOR_NAME).exists():
        return AutoImageProcessor.from_pretrained(str(folder))
    if getattr(model, "pretrained_cfg", None):
        return find_image_processor(None, model)
    if not getattr(model, "name_or_path", None):
        raise ValueError(
            f"There is no {IMAGE_PROCESSOR_NAME} in {folder}, and {type(model).__name__} names no model that has one; "
            "save the adapter with save_image_classifier(model, image_processor, folder)."
        )
    return AutoImageProcessor.from_pretrained(model.name_or_path, **download)
