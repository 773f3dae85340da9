"""The base model that a saved adapter names, of transformers or timm, and the image processor that goes with it.

A timm model has transformers' ``TimmWrapperImageProcessor``. Its file holds timm's data config (input size, mean,
standard deviation, interpolation, crop), and the arguments that ``timm.create_model`` built the model with.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..adapter.config import FacTConfig
from ..adapter.names import is_hub_id, mark_local_folder
from ..architecture.heads import label_settings

# timm is imported where it is needed, since not every user of the package has it.
TIMM_PROCESSOR = "TimmWrapperImageProcessor"


def trained_on(config: FacTConfig, field: str) -> str:
    """What the config says of the class of the base model: its ``base_model_class`` or its ``parent_library``."""
    return str(config.auto_mapping.get(field)) if isinstance(config.auto_mapping, dict) else ""


def is_timm(config: FacTConfig) -> bool:
    """Whether the adapter was trained on a timm model."""
    return trained_on(config, "parent_library").startswith("timm.")


def base_class(config: FacTConfig) -> Any:
    """The class that the adapter was trained on, if transformers has it; else ``AutoModelForImageClassification``."""
    found = getattr(transformers, trained_on(config, "base_model_class"), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else AutoModelForImageClassification


def name_of_timm_model(model: nn.Module) -> tuple[str | None, str | None]:
    """The Hub id or local folder that a timm model was loaded from, and the revision; None for what is not known."""
    source = getattr(model, "pretrained_cfg", {})
    if source.get("file"):
        return mark_local_folder(str(source["file"])), None
    name, _, revision = (source.get("hf_hub_id") or "").partition("@")
    return name or None, revision or None


def timm_arguments(config: FacTConfig, folder: Path) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds the model that the adapter in `folder` was trained on."""
    import timm

    # The arguments of `create_model` itself say, among others, where weights are loaded from.
    model_args = read_settings(folder).get("model_args", {})
    if not isinstance(model_args, dict) or model_args.keys() & inspect.signature(timm.create_model).parameters.keys():
        raise ValueError(
            f"model_args={model_args!r} in {folder / IMAGE_PROCESSOR_NAME} are not arguments of a timm model alone; "
            "take the file from where the adapter was saved, or pass base_model=, a loaded timm model."
        )
    return {**model_args, "num_classes": len(config.labels)} if config.labels else model_args


def load_base(config: FacTConfig, folder: Path, base_model: str | Path | None, token: str | bool | None) -> Any:
    """Load the base model of the adapter in `folder`, with the adapter's labels as its outputs.

    `base_model`, a name or folder, is used in place of what the config says. timm accepts no `token`; it uses the one
    that the user is logged in with.
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
        import timm

        source = f"local-dir:{name}" if Path(name).exists() else f"hf-hub:{name}{f'@{revision}' if revision else ''}"
        return timm.create_model(source, pretrained=True, **timm_arguments(config, folder))
    # A head of another size is replaced by a new one, and that by the adapter's.
    head = {**label_settings(config.labels), "ignore_mismatched_sizes": True} if config.labels else {}
    return base_class(config).from_pretrained(name, revision=revision, token=token, **head)


def find_image_processor(image_processor: Any, model: nn.Module) -> Any:
    """The image processor to save with an adapter of the base model `model`.

    `image_processor` is an image processor, a data config of timm, or None for the data config of a timm `model`.
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
    """The image processor with a data config of timm."""
    if not isinstance(data_config, dict) or not {"input_size", "mean", "std"} <= data_config.keys():
        raise ValueError(
            f"image_processor={data_config!r} is not a data config of timm, which has input_size, mean and std; pass "
            "what timm.data.resolve_input_data_config(model) returns."
        )
    from transformers import TimmWrapperImageProcessor  # imports timm

    return TimmWrapperImageProcessor(data_config)


def save_image_processor(image_processor: Any, model: nn.Module, folder: Path) -> None:
    """Write ``preprocessor_config.json`` into `folder`."""
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
    """The contents of ``preprocessor_config.json`` in `folder`; empty if there is none."""
    file = folder / IMAGE_PROCESSOR_NAME
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return settings if isinstance(settings, dict) else {}


def load_image_processor(folder: Path, model: Any, revision: str | None, token: str | bool | None) -> Any:
    """The image processor saved in `folder`, or else that of the base model `model`, of this revision on the Hub."""
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
    return AutoImageProcessor.from_pretrained(model.name_or_path, revision=revision, token=token)
