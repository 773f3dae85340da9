"""An image classifier as one thing: adapter, head, labels, image processor and model card go and come together."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, create_repo, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..architecture.heads import label_settings
from ..storage.hub import is_hub_id
from ..storage.replacing import replacing_files
from ..tuner.config import FacTConfig, fact_config, stored_as
from .base_model import load_base
from .card import check_metrics, copy_model_card, write_model_card

FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, IMAGE_PROCESSOR_NAME]


def save_image_classifier(
    model: PeftModel,
    image_processor: BaseImageProcessor,
    folder: str | Path,
    metrics: dict[str, float] | None = None,
    base_model: str | None = None,
    storage: str | None = None,
    head_storage: str | None = None,
) -> None:
    """Save the active adapter of `model` with its head, labels, image processor and a model card.

    What lies in the folder is replaced as a whole: if the process is killed or the disk is full, the folder is as it
    was, or it is the new one. (PEFT's own ``model.save_pretrained`` writes over the files in place.)

    Args:
        model: A transformers image classifier with a FacT adapter.
        image_processor: What prepares its images. One of timm cannot be saved; `load_image_classifier` then takes the
            base model's.
        folder: Where to save. Of a model card that lies there, what a user wrote is kept.
        metrics: Results to list in the model card, such as ``{"accuracy": 0.93}``.
        base_model: Hub id of the base model, if it was not loaded by that.
        storage: In what to store the factors, such as ``"int8"``, see `FacTConfig`; None: as the adapter's config says.
            The model stays as it is: `quantize_adapter` rounds it, for metrics of what is saved.
        head_storage: The same for the head; None: as the config says, which by default is no less than ``"int8"``.

    Raises:
        ValueError: If the active adapter of `model` is not a FacT adapter, there are several, a metric is no number, or
            a number of the adapter is not finite. The folder is then as it was.
    """
    folder = Path(folder)
    check_metrics(metrics)
    active_config(model)
    with replacing_files(folder) as incoming:
        save_files(model, image_processor, incoming, base_model, storage, head_storage)
        copy_model_card(folder, incoming)
        write_model_card(incoming, folder.resolve().name, metrics)


def load_image_classifier(
    folder_or_hub_id: str | Path,
    *,
    base_model: str | Path | PreTrainedModel | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PeftModel, BaseImageProcessor]:
    """Load a classifier that is ready for ``pipeline("image-classification", model=..., image_processor=...)``.

    Args:
        folder_or_hub_id: Where the adapter of a transformers model lies; it may have been saved by PEFT alone.
        base_model: Name, folder, or the loaded model, in place of the base model that the adapter names.
        revision: Branch, tag or commit of the adapter's repository.
        token: Hub token.

    Returns:
        The model in evaluation mode, and the image processor saved with the adapter or else that of the base model.

    Raises:
        ValueError: If this is not a FacT adapter, or no base model is known, or the base does not fit the adapter.
    """
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        if not is_hub_id(str(folder_or_hub_id)):
            raise ValueError(f"folder_or_hub_id={str(folder_or_hub_id)!r} is neither a folder nor a name on the Hub.")
        folder = Path(snapshot_download(str(folder_or_hub_id), revision=revision, token=token, allow_patterns=FILES))
    config = FacTConfig.from_pretrained(str(folder))
    if not isinstance(config, FacTConfig):
        raise ValueError(f"{folder_or_hub_id} is not a FacT adapter but one of {config.peft_type}.")
    base = base_model if isinstance(base_model, PreTrainedModel) else load_base(config, base_model, token)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    if config.labels:
        base.config.update(label_settings(config.labels))
    source = str(folder) if (folder / IMAGE_PROCESSOR_NAME).exists() else base.name_or_path
    accept_in_pipeline()
    return model, AutoImageProcessor.from_pretrained(source, token=token)


def push_image_classifier(
    model: PeftModel,
    image_processor: BaseImageProcessor,
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
    """Upload what `save_image_classifier` saves, in one commit; the repository is created if it is missing.

    Args:
        model: A transformers image classifier with a FacT adapter.
        image_processor: What prepares its images.
        repo_id: Repository to upload to. Of a model card that is there, what a user wrote is kept.
        metrics: Results to list in the model card, such as ``{"accuracy": 0.93}``.
        base_model: Hub id of the base model, if it was not loaded by that.
        storage: As for `save_image_classifier`.
        head_storage: Likewise.
        private: Whether a new repository is private. None: as the owner's default is.
        token: Hub token.
        commit_message: Message of the commit.

    Raises:
        ValueError: If the active adapter is not a FacT adapter, there are several, a metric is no number, or the base
            model is not known by a Hub id. Nothing has been sent then.
    """
    check_metrics(metrics)
    config = active_config(model)
    base = base_model or config.base_model_name_or_path
    if not is_hub_id(base):
        raise ValueError(
            f"The base model {base!r} is not on the Hub, so nobody else could load this adapter; pass base_model=, the "
            "Hub id of the base model (push it first if it is your own)."
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_files(model, image_processor, folder, base, storage, head_storage)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        try:
            shutil.copyfile(hf_hub_download(repo_id, "README.md", token=token), folder / "README.md")
        except EntryNotFoundError:
            pass
        write_model_card(folder, repo_id, metrics)
        return upload_folder(repo_id=repo_id, folder_path=folder, token=token, commit_message=commit_message)


def save_files(
    model: PeftModel,
    image_processor: BaseImageProcessor,
    folder: Path,
    base_model: str | None,
    storage: str | None,
    head_storage: str | None,
) -> None:
    """Save the active adapter and the image processor into `folder` itself, and no model card.

    PEFT would write a card, with local paths in it, and put an adapter that is not called "default" into a subfolder.
    """
    adapter_name = model.active_adapter
    config = fact_config(model, adapter_name)
    with (
        TemporaryDirectory() as temporary,
        stored_as(config, storage or config.storage, head_storage or config.head_storage),
    ):
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = Path(temporary, "" if adapter_name == "default" else adapter_name)
        if base_model:
            config = FacTConfig.from_pretrained(str(saved))
            if base_model != config.base_model_name_or_path:
                config.base_model_name_or_path, config.revision = base_model, None
                config.save_pretrained(str(saved))
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copyfile(saved / name, folder / name)
    image_processor.save_pretrained(folder)


def active_config(model: PeftModel) -> FacTConfig:
    """The config of the active adapter.

    Raises:
        ValueError: If it is not a FacT adapter, there are several, or `model` is not a `PeftModel`.
    """
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
    return fact_config(model, model.active_adapter)


def accept_in_pipeline() -> None:
    """Have ``pipeline("image-classification")`` take a `PeftModel` without logging that it is not supported."""
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS  # not every user of the package needs pipelines

    supported = SUPPORTED_PEFT_TASKS.setdefault("image-classification", [])
    if "PeftModel" not in supported:
        supported.append("PeftModel")
