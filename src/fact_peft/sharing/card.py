"""The model card of a saved adapter, written from the files beside it."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.names import as_code, for_markdown, for_python, is_hub_id
from ..method.decomposition import DECOMPOSITIONS
from ..operations.inspection import storage_in_words, task_bytes
from .base_model import base_class, is_timm, timm_arguments

CARD = "README.md"
BEGIN = "<!-- begin: written by fact_peft when the adapter is saved; what stands outside is kept -->"
END = "<!-- end: written by fact_peft -->"
OUR_PART = re.compile(
    rf"^[ \t]*{re.escape(BEGIN)}[ \t]*$.*?^[ \t]*{re.escape(END)}[ \t]*$\n?", re.MULTILINE | re.DOTALL
)
# Title of the forms that peft and transformers leave in a folder or repository for somebody to fill in.
BLANK_FORM = "# Model Card for Model ID"
MAX_LABELS = 100
TEXT = """\
# {title}

An image classifier: {base}, fine-tuned with
[FacT, Factor-Tuning](https://arxiv.org/abs/2212.03145), a method of parameter-efficient fine-tuning.
The files hold the factors and the trained head; the base model is loaded from its own place.

| | |
|---|---|
| method | {method} |
| rank | {rank} |
| U and V are shared by | {shared_by} |
| scale | {scale:g} |
| parameters of the factors | {num_factors:,} |
| other trained parameters{head} | {num_others:,} |
| stored as | {storage} |
| bytes on disk, head and config included | {num_bytes:,} |

{labels}{results}## Use

Ready to classify, with labels and preprocessing:

```python
from fact_peft import load_image_classifier
{classify}
```

With PEFT alone, say to train on or to merge:

```python
import fact_peft  # makes the method known to PEFT
from peft import PeftModel
{base_code}
model = PeftModel.from_pretrained(base, {name})
```"""
CLASSIFY_WITH_TRANSFORMERS = """\
from transformers import pipeline

{load}
classify = pipeline("image-classification", model=model, image_processor=image_processor)
print(classify("image.png"))"""
CLASSIFY_WITH_TIMM = """\
from PIL import Image

{load}
logits = model(image_processor(Image.open("image.png"))["pixel_values"])
print({answer})"""


def write_model_card(
    adapter: Adapter, folder: Path, name: str, metrics: dict[str, float] | None, earlier: Path | None
) -> None:
    """Write ``README.md`` beside the adapter that was written into `folder`.

    Everything in the file `earlier` is kept, except the metadata that follow from the adapter and the part between our
    two comments. A card without these comments keeps its whole text. `name` is the Hub id of the adapter, or the name
    of its folder.
    """
    card = ModelCard(earlier.read_text(encoding="utf-8") if earlier and earlier.is_file() else "---\n{}\n---\n")
    section = f"{BEGIN}\n{card_text(adapter, folder, name, metrics or {})}\n{END}\n"
    if not card.text.strip() or BLANK_FORM in card.text:
        card.text = f"\n{section}"
    else:
        card.text = OUR_PART.sub(lambda _: section, card.text, count=1)
    assert isinstance(card.data, ModelCardData)
    update_metadata(card.data, adapter.config)
    card.save(folder / CARD)


def check_metrics(metrics: dict[str, float] | None) -> None:
    """Raise a `ValueError` if a name is not a string or a value not a number, before anything is saved."""
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
    """Set the fields that follow from the adapter; keep the others, such as the license."""
    data.library_name = "peft"
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    kept = {tag for tag in map(str, data.tags or []) if not tag.startswith("base_model:")}
    tags = kept | {"fact", "timm" if is_timm(config) else "transformers"}
    if is_hub_id(config.base_model_name_or_path):
        data.base_model = config.base_model_name_or_path
        tags.add(f"base_model:adapter:{data.base_model}")
    elif isinstance(data.base_model, str) and not is_hub_id(data.base_model):
        data.base_model = None  # a local folder, as PEFT writes it
    data.tags = sorted(tags)


def card_text(adapter: Adapter, folder: Path, name: str, metrics: dict[str, float]) -> str:
    """The part of the card between the comments. Names that somebody else chose are quoted."""
    config = adapter.config
    base = config.base_model_name_or_path if is_hub_id(config.base_model_name_or_path) else None
    heads = for_markdown(", ".join(config.modules_to_save or []))
    labels = results = ""
    if config.labels:
        more = len(config.labels) - MAX_LABELS
        listed = ", ".join(as_code(label) for label in config.labels[:MAX_LABELS])
        labels = f"## Labels\n\n{listed}{f' and {more} more, see adapter_config.json' if more > 0 else ''}\n\n"
    if metrics:
        rows = "\n".join(f"| {for_markdown(metric)} | {float(value):.6g} |" for metric, value in metrics.items())
        results = f"## Results\n\n| metric | value |\n|---|---|\n{rows}\n\n"
    return TEXT.format(
        title=for_markdown(name),
        base=f"[{base}](https://huggingface.co/{base})" if base else "a vision transformer",
        method=DECOMPOSITIONS[config.decomposition].title,
        rank=config.rank,
        shared_by="all layers" if config.share == "model" else "the layers of each block",
        scale=config.scaling,
        num_factors=adapter.num_factor_parameters,
        head=f" (head: {heads})" if heads else "",
        num_others=adapter.num_other_parameters,
        storage=storage_in_words(config),
        num_bytes=task_bytes(adapter, folder).total,
        labels=labels,
        results=results,
        classify=classify_code(config, name, base),
        base_code=base_code(config, folder, base),
        name=for_python(name),
    )


def classify_code(config: FacTConfig, name: str, base: str | None) -> str:
    """The code that loads the classifier and uses it."""
    base_argument = "" if base else f", base_model={for_python('name or folder of the base model')}"
    load = f"model, image_processor = load_image_classifier({for_python(name)}{base_argument})"
    answer = "model.active_peft_config.labels[logits.argmax()]" if config.labels else "logits.argmax()"
    return (CLASSIFY_WITH_TIMM if is_timm(config) else CLASSIFY_WITH_TRANSFORMERS).format(load=load, answer=answer)


def base_code(config: FacTConfig, folder: Path, base: str | None) -> str:
    """The code that loads the base model."""
    revision = config.revision if base else None
    if is_timm(config):
        at = f"@{revision}" if revision else ""
        source = for_python(f"hf-hub:{base}{at}" if base else "local-dir:folder of the base model")
        arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(config, folder).items())
        return f"import timm\n\nbase = timm.create_model({source}, pretrained=True{arguments})"
    architecture = base_class(config).__name__
    arguments = for_python(base or "name or folder of the base model")
    arguments += f", num_labels={len(config.labels)}, ignore_mismatched_sizes=True" if config.labels else ""
    arguments += f", revision={for_python(revision)}" if revision else ""
    return f"from transformers import {architecture}\n\nbase = {architecture}.from_pretrained({arguments})"
