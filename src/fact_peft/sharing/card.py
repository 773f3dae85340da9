"""The model card of a saved adapter, written from the files beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.names import as_code, for_markdown, for_python, is_hub_id
from ..method.decomposition import DECOMPOSITIONS
from ..operations.inspection import storage_in_words, task_bytes
from .base_model import base_class, is_timm, timm_arguments

BEGIN = "<!-- begin: written by fact_peft when the adapter is saved; what stands outside is kept -->"
END = "<!-- end: written by fact_peft -->"
# Title of the forms that peft and transformers leave in a folder or repository for somebody to fill in.
BLANK_FORM = "# Model Card for Model ID"
MAX_LABELS = 100
CARD = "README.md"


def write_model_card(adapter: Adapter, folder: Path, name: str, metrics: dict[str, float] | None = None) -> None:
    """Write or update ``README.md`` beside an adapter that was written.

    Everything in an existing card is kept, except the metadata that follow from the adapter and the part between our
    two comments. A card without these comments keeps its whole text.

    Args:
        adapter: The adapter.
        folder: Where it was written.
        name: What the card calls the adapter and loads it by: its Hub id, or the name of its folder.
        metrics: Results to list, by name.
    """
    file = folder / CARD
    section = f"{BEGIN}\n{card_text(adapter, folder, name, metrics or {})}\n{END}\n"
    card = ModelCard(file.read_text(encoding="utf-8") if file.exists() else "---\n{}\n---\n")
    if not card.text.strip() or BLANK_FORM in card.text:
        card.text = f"\n{section}"
    else:
        card.text = replace_section(card.text, section)
    assert isinstance(card.data, ModelCardData)
    update_metadata(card.data, adapter.config)
    card.save(file)


def replace_section(text: str, section: str) -> str:
    """`text` with `section` in place of the part between our two comments, each on a line of its own, if it has one."""
    lines = text.splitlines(keepends=True)
    marks = [line.strip() for line in lines]
    if BEGIN not in marks or END not in marks[marks.index(BEGIN) :]:
        return text
    begin = marks.index(BEGIN)
    return "".join([*lines[:begin], section, *lines[marks.index(END, begin) + 1 :]])


def copy_model_card(source: Path, target: Path) -> None:
    """Take the card of a folder, if it has one, into another one, to be brought up to date there."""
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, target / CARD)


def check_metrics(metrics: dict[str, float] | None) -> None:
    """Refuse metrics that cannot be written down, before anything is saved.

    Raises:
        ValueError: If a name is not a string, or a value not a number.
    """
    for name, value in (metrics or {}).items():
        try:
            number = None if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = None
        if number is None or not isinstance(name, str):
            raise ValueError(
                f"metrics has {name!r}: {value!r}, which is no number under a name; pass such as {{'accuracy': 0.93}}."
            )


def update_metadata(data: ModelCardData, config: FacTConfig) -> None:
    """Set what follows from the adapter; keep the rest, such as the license."""
    data.library_name = "peft"
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    kept = {tag for tag in data.tags or [] if not tag.startswith("base_model:")}
    tags = kept | {"fact", "timm" if is_timm(config) else "transformers"}
    if is_hub_id(config.base_model_name_or_path):
        data.base_model = config.base_model_name_or_path
        tags.add(f"base_model:adapter:{data.base_model}")
    elif isinstance(data.base_model, str) and not is_hub_id(data.base_model):
        data.base_model = None  # a local folder, as PEFT writes it
    data.tags = sorted(tags)


def card_text(adapter: Adapter, folder: Path, name: str, metrics: dict[str, float]) -> str:
    """What the adapter is, its labels and results, and the code that loads it, as Markdown.

    Names that somebody else chose are quoted.
    """
    config, taken = adapter.config, task_bytes(adapter, folder)
    heads = for_markdown(", ".join(config.modules_to_save or []))
    has_base = is_hub_id(config.base_model_name_or_path)
    base = f"[{config.base_model_name_or_path}](https://huggingface.co/{config.base_model_name_or_path})"
    lines = [
        f"# {for_markdown(name)}",
        "",
        f"An image classifier: {base if has_base else 'a vision transformer'}, fine-tuned with",
        "[FacT, Factor-Tuning](https://arxiv.org/abs/2212.03145), a method of parameter-efficient fine-tuning.",
        "The files hold the factors and the trained head; the base model is loaded from its own place.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {DECOMPOSITIONS[config.decomposition].title} |",
        f"| rank | {config.rank} |",
        f"| U and V are shared by | {'all layers' if config.share == 'model' else 'the layers of each block'} |",
        f"| scale | {config.scaling:g} |",
        f"| parameters of the factors | {adapter.num_factor_parameters:,} |",
        f"| other trained parameters{f' (head: {heads})' if heads else ''} | {adapter.num_other_parameters:,} |",
        f"| stored as | {storage_in_words(config)} |",
        f"| bytes on disk, head and config included | {taken.total:,} |",
        "",
    ]
    if config.labels:
        more = len(config.labels) - MAX_LABELS
        listed = ", ".join(as_code(label) for label in config.labels[:MAX_LABELS])
        lines += ["## Labels", "", listed + (f" and {more} more, see adapter_config.json" if more > 0 else ""), ""]
    if metrics:
        rows = [f"| {for_markdown(metric)} | {float(value):.6g} |" for metric, value in metrics.items()]
        lines += ["## Results", "", "| metric | value |", "|---|---|", *rows, ""]
    return "\n".join([*lines, *usage(config, folder, name, has_base)])


def usage(config: FacTConfig, folder: Path, name: str, has_base: bool) -> list[str]:
    """The code that loads the adapter, as Markdown."""
    base = str(config.base_model_name_or_path) if has_base else "name or folder of the base model"
    revision = config.revision if has_base else None
    arguments = for_python(name) + ("" if has_base else f", base_model={for_python(base)}")
    load = f"model, image_processor = load_image_classifier({arguments})"
    if is_timm(config):
        at = f"@{revision}" if revision else ""
        base = f"hf-hub:{base}{at}" if has_base else "local-dir:folder of the base model"
        arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(config, folder).items())
        library, base = "import timm", f"timm.create_model({for_python(base)}, pretrained=True{arguments})"
        classify = [
            "from fact_peft import load_image_classifier",
            "from PIL import Image",
            "",
            load,
            'logits = model(image_processor(Image.open("image.png"))["pixel_values"])',
            f"print({'model.active_peft_config.labels[logits.argmax()]' if config.labels else 'logits.argmax()'})",
        ]
    else:
        arguments = f", num_labels={len(config.labels)}, ignore_mismatched_sizes=True" if config.labels else ""
        arguments += f", revision={for_python(revision)}" if revision else ""
        architecture = base_class(config).__name__
        library = f"from transformers import {architecture}"
        base = f"{architecture}.from_pretrained({for_python(base)}{arguments})"
        classify = [
            "from fact_peft import load_image_classifier",
            "from transformers import pipeline",
            "",
            load,
            'classify = pipeline("image-classification", model=model, image_processor=image_processor)',
            'print(classify("image.png"))',
        ]
    return [
        "## Use",
        "",
        "Ready to classify, with labels and preprocessing:",
        "",
        "```python",
        *classify,
        "```",
        "",
        "With PEFT alone, say to train on or to merge:",
        "",
        "```python",
        "import fact_peft  # makes the method known to PEFT",
        "from peft import PeftModel",
        library,
        "",
        f"base = {base}",
        f"model = PeftModel.from_pretrained(base, {for_python(name)})",
        "```",
    ]
