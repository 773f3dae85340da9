"""What the installed transformers and peft refuse for every method, found out by asking LoRA."""

import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from backbones import make_backbone
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

import fact_peft

OURS = Path(fact_peft.__file__).parent


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])


def with_lora() -> nn.Module:
    model = make_backbone("vit")
    model.add_adapter(lora())
    return model


def saved_with_head(folder: Path) -> str:
    """A LoRA saved by PEFT with a head of zeros, and its base."""
    make_backbone("vit").save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(folder / "base"), lora())
    for parameter in model.get_base_model().classifier.modules_to_save.parameters():
        parameter.data.zero_()
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def assert_has_head_of_zeros(model: nn.Module) -> None:
    head = model.classifier.modules_to_save["default"]
    assert not any(parameter.any() for parameter in head.parameters()), "the head that was saved is not loaded"


def load_into_a_model(folder: Path) -> nn.Module:
    model = make_backbone("vit")
    model.load_adapter(saved_with_head(folder))
    return model


def load_with_the_model(folder: Path) -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(saved_with_head(folder), num_labels=5)


# Each does with LoRA what its name says, as transformers' own method.
VERBS: dict[str, Callable[[Path], object]] = {
    "add_adapter": lambda folder: with_lora(),
    "load_adapter": load_into_a_model,
    "from_pretrained": load_with_the_model,
    "load_adapter, with a head": lambda folder: assert_has_head_of_zeros(load_into_a_model(folder)),
    "from_pretrained, with a head": lambda folder: assert_has_head_of_zeros(load_with_the_model(folder)),
    "save_pretrained": lambda folder: with_lora().save_pretrained(folder),
    "set_adapter": lambda folder: with_lora().set_adapter("default"),
    "disable_adapters": lambda folder: with_lora().disable_adapters(),
    "enable_adapters": lambda folder: with_lora().enable_adapters(),
    "delete_adapter": lambda folder: with_lora().delete_adapter("default"),
}


@functools.cache
def refusal(verb: str) -> str | None:
    """What transformers says when LoRA is used with this method of it; None if it works."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            VERBS[verb](Path(folder))
        except Exception as error:
            if any(Path(frame.filename).is_relative_to(OURS) for frame in traceback.extract_tb(error.__traceback__)):
                raise  # we broke LoRA
            return f"{type(error).__name__}: {error}"
    return None


def skip_where_lora_is_refused(*verbs: str) -> None:
    """Skip the calling test if transformers refuses one of its methods for LoRA too, with what it says."""
    for verb in verbs:
        if (said := refusal(verb)) is not None:
            pytest.skip(f"transformers' {verb} refuses LoRA too: {said}")
