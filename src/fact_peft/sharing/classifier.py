"""Save, load and push an image classifier: adapter, head, labels, image processor and model card together."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..adapter.adapter import Adapter
from ..adapter.files import find_folder, replacing_files
from ..adapter.names import is_hub_id
from ..architecture.heads import label_settings
from ..upstream import accept_in_pipeline
from .base_model import find_image_processor, load_base, load_image_processor, name_of_timm_model, save_image_processor
from .card import CARD, check_metrics, write_model_card

FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, IMAGE_PROCESSOR_NAME]


def save_image_classifier(
    model: PeftModel,
    image_processor: BaseImageProcessor | dict[str, Any] | None,
    folder: str | Path,
    metrics: dict[str, float] | None = None,
    base_model: str | None = None,
    storage: str | None = None,
    head_storage: str | None = None,
) -> None:
    """Save the active adapter of `model` with its head, labels, image processor and a model card.

    Each file is written beside the old one and then renamed, so that a killed process or a full disk damages no file
    (see `Adapter.write`). Under torch.distributed every process may call this; rank 0 writes.

    Args:
        model: An image classifier of transformers or timm with a FacT adapter.
        image_processor: The image processor of the model. For a timm model: its data config, or None for the one that
            timm resolves from the model.
        folder: Where to save. If it has a model card, what a user wrote there is kept.
        metrics: Results to list in the model card, such as ``{"accuracy": 0.93}``.
        base_model: Hub id of the base model, if the model was not loaded by that id.
        storage: Data type of the factors on disk, such as ``"int8"``, see `FacTConfig`; None for that of the adapter's
            config. The model is not changed. To measure what is saved, round it with `quantize_adapter` first.
        head_storage: The same for the head; None for that of the config, by default at least ``"int8"``.

    Raises:
        ValueError: If the active adapter of `model` is not a FacT adapter, there are several, `image_processor` cannot
            be saved, a metric is no number, or a number of the adapter is not finite. The folder is then as it was.
    """
    folder = Path(folder)
    adapter, image_processor = parts_to_save(model, image_processor, metrics, base_model, storage, head_storage)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    with replacing_files(folder) as staging:
        save_image_processor(image_processor, model.get_base_model(), staging)
        adapter.write_files(staging)
        write_model_card(adapter, staging, folder.resolve().name, metrics, earlier=folder / CARD)


def load_image_classifier(
    folder_or_hub_id: str | Path,
    *,
    base_model: str | Path | nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PeftModel, BaseImageProcessor]:
    """Load a classifier with its labels and preprocessing.

    A model of transformers is ready for ``pipeline("image-classification", model=..., image_processor=...)``. A model
    of timm takes what its image processor returns: ``model(image_processor(images)["pixel_values"])``.

    Args:
        folder_or_hub_id: Folder or Hub id of the adapter, which may have been saved by PEFT alone.
        base_model: Name, folder, or the loaded model, to use in place of the base model that the adapter names.
        revision: Branch, tag or commit of the adapter's repository.
        token: Hub token.

    Returns:
        The model in evaluation mode, and the image processor saved with the adapter or else that of the base model.

    Raises:
        ValueError: If this is not a FacT adapter, or no base model is known, or the base does not fit the adapter.
    """
    folder = find_folder(folder_or_hub_id, FILES, revision, token)
    adapter = Adapter.read(folder)
    base: Any = base_model
    if not isinstance(base_model, nn.Module):
        base = load_base(adapter.config, folder, base_model, token)
    # With a config, PEFT does not read and check the file a second time. It changes the config that it is given.
    model = PeftModel.from_pretrained(base, str(folder), config=copy.copy(adapter.config)).eval()
    if adapter.config.labels and isinstance(base, PreTrainedModel):
        base.config.update(label_settings(adapter.config.labels))
    accept_in_pipeline()
    revision = None if base_model else adapter.config.revision  # of the base model
    return model, load_image_processor(folder, base, revision=revision, token=token)


def push_image_classifier(
    model: PeftModel,
    image_processor: BaseImageProcessor | dict[str, Any] | None,
    repo_id: str,
    *,
    metrics: dict[str, float] | None = None,
    base_model: str | None = None,
    storage: str | None = None,
    head_storage: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload FacT adapter",
) -> CommitInfo:
    """Upload what `save_image_classifier` saves, in one commit. The repository is created if it is missing.

    Arguments that are not listed are those of `save_image_classifier`.

    Args:
        repo_id: Repository to upload to. If it has a model card, what a user wrote there is kept.
        private: Whether a new repository is private; None for the default of its owner.
        token: Hub token.
        commit_message: Message of the commit.

    Raises:
        ValueError: If the active adapter is not a FacT adapter, there are several, a metric is no number, or the base
            model is not known by a Hub id. Nothing has been sent then.
    """
    adapter, image_processor = parts_to_save(model, image_processor, metrics, base_model, storage, head_storage)
    name = adapter.config.base_model_name_or_path
    if not is_hub_id(name):
        raise ValueError(
            f"The base model {name!r} is not on the Hub, so nobody else could load this adapter; pass base_model=, the "
            "Hub id of the base model (push it first if it is your own)."
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_image_processor(image_processor, model.get_base_model(), folder)
        adapter.write_files(folder)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        try:
            earlier = Path(hf_hub_download(repo_id, CARD, token=token))
        except EntryNotFoundError:
            earlier = None
        write_model_card(adapter, folder, repo_id, metrics, earlier)
        return upload_folder(repo_id=repo_id, folder_path=folder, token=token, commit_message=commit_message)


def parts_to_save(
    model: PeftModel,
    image_processor: Any,
    metrics: dict[str, float] | None,
    base_model: str | None,
    storage: str | None,
    head_storage: str | None,
) -> tuple[Adapter, Any]:
    """Check the arguments of `save_image_classifier`; return the adapter and the image processor to save."""
    check_metrics(metrics)
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}; pass the PeftModel that get_peft_model returned.")
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"model has {len(active)} active adapters, {active}, and a folder holds one. To save one of them, call "
            f"set_adapter({active[0]!r}) first; to save what they do together, add_weighted_adapter({active}, "
            f"{[1.0] * len(active)}, 'sum') and set_adapter('sum')."
            if active
            else "model has no active adapter; call set_adapter(...) with the one to save."
        )
    adapter, base = Adapter.of(model, active[0]), model.get_base_model()
    config, revision = adapter.config, None
    changes = {"storage": storage or config.storage, "head_storage": head_storage or config.head_storage}
    if base_model is None and config.base_model_name_or_path is None:
        base_model, revision = name_of_timm_model(base)
    if base_model and base_model != config.base_model_name_or_path:
        changes |= {"base_model_name_or_path": base_model, "revision": revision}
    return adapter.replace(**changes), find_image_processor(image_processor, base)
