"""The code of docs/vision_towers.md runs as it stands, in order, on tiny models in the place of those of the Hub."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VIT
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from fact_peft import FacTConfig, FacTLinear

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "vision_towers.md").read_text()
SIZE = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def blocks(page: str) -> list[str]:
    """The Python of a page, each block behind as many empty lines as put errors at the right line of the page."""
    text = (DOCS / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def run(page: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The names there are after each block of a page, run in order as one program that begins with `names`."""
    after = []
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
        after.append(dict(names))
    return after


def save_towers() -> None:
    """Tiny models below the working directory, where transformers looks before it asks the Hub."""
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**VIT)).save_pretrained("facebook/dinov3-vits16-pretrain-lvd1689m")
    BitImageProcessor(**SIZE).save_pretrained("facebook/dinov3-vits16-pretrain-lvd1689m")
    Dinov2Model(Dinov2Config(**VIT)).save_pretrained("facebook/dinov2-small")
    BitImageProcessor(**SIZE).save_pretrained("facebook/dinov2-small")
    siglip = SiglipConfig(vision_config=VIT, text_config={**TEXT, "vocab_size": 50, "projection_size": 32})
    SiglipModel(siglip).save_pretrained("google/siglip-base-patch16-224")
    SiglipImageProcessor(size=SIZE["size"]).save_pretrained("google/siglip-base-patch16-224")

    characters = [*map(chr, range(33, 127))]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    clip = CLIPConfig(
        vision_config=VIT,
        text_config={**TEXT, "vocab_size": len(tokens), "eos_token_id": len(tokens) - 1},
        projection_dim=16,
    )
    CLIPModel(clip).save_pretrained("openai/clip-vit-base-patch32")
    CLIPProcessor(CLIPImageProcessor(**SIZE), tokenizer).save_pretrained("openai/clip-vit-base-patch32")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """The names there are after each block of the page, given ten handwritten digits as its images."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[:10]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("towers"))
        save_towers()
        after = run("vision_towers.md", {"images": images, "labels": torch.as_tensor(digits.target[:10])})
        yield dict(zip(("tools", "DINOv3", "DINOv2", "DINOv2 classifier", "SigLIP", "CLIP"), after, strict=True))


def adapted(model: nn.Module) -> set[str]:
    """Names of the adapted layers, as in all blocks."""
    return {re.sub(r"\d+", "*", name) for name, module in model.named_modules() if isinstance(module, FacTLinear)}


def trained_beside_factors(model: nn.Module) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("base_model.model.") for name in names if ".factors." not in name}


def test_a_tower_without_a_classifier_learns_and_comes_back(page: dict[str, dict[str, Any]]) -> None:
    names = page["DINOv3"]
    # `logits` are those of the reloaded model; one that has learnt nothing has a loss of log 10.
    assert F.cross_entropy(names["logits"], names["labels"]) < 0.9 * math.log(10)
    tensors = load_file("dinov3-adapter/adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"factors", "classifier"}


@pytest.mark.parametrize(
    ("block", "tower"),
    [
        ("DINOv3", AutoModel.from_pretrained),
        ("DINOv2", AutoModel.from_pretrained),
        ("SigLIP", SiglipVisionModel.from_pretrained),
        ("CLIP", CLIPVisionModel.from_pretrained),
    ],
)
def test_the_head_you_attach_is_all_that_is_trained_in_full(
    page: dict[str, dict[str, Any]], block: str, tower: Callable[[str], nn.Module]
) -> None:
    model = page[block]["few_shot"](tower(page[block]["name"]), num_labels=10)
    assert trained_beside_factors(model) == {
        f"classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    assert all(".layer" in name for name in adapted(model))
    assert sum(isinstance(module, FacTLinear) for module in model.modules()) == 2 * 6


def test_dinov2_with_its_own_classifier_is_found(page: dict[str, dict[str, Any]]) -> None:
    model = page["DINOv2 classifier"]["model"]
    assert model.peft_config["default"].modules_to_save == ["classifier"]


def test_clip_is_adapted_in_both_towers_and_merged(page: dict[str, dict[str, Any]]) -> None:
    names = page["CLIP"]
    assert names["probabilities"].shape == (10, 2)
    inputs = {**names["prompts"](["fox", "owl"]), "pixel_values": names["pixel_values"]}
    merged = CLIPModel.from_pretrained("clip-adapted")
    reloaded = PeftModel.from_pretrained(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"), "clip-adapter")
    assert {name.split(".")[2] for name in adapted(reloaded)} == {"vision_model", "text_model"}
    for model in (merged, reloaded):
        found = model.eval()(**inputs).logits_per_image.softmax(-1)
        torch.testing.assert_close(found, names["probabilities"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("excluded", "kept"), [("text", "vision"), ("vision", "text")])
def test_one_tower_of_clip_is_one_argument(page: dict[str, dict[str, Any]], excluded: str, kept: str) -> None:
    clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    (config,) = re.findall(rf"`(FacTConfig\(exclude_modules=r\"{excluded}_model.*?\))`", PAGE)
    model = get_peft_model(clip, eval(config, {"FacTConfig": FacTConfig}))
    assert {name.split(".")[2] for name in adapted(model)} == {f"{kept}_model"}


def test_towers_of_equal_width_share_factors() -> None:
    model = SiglipModel(SiglipConfig(vision_config=VIT, text_config={**TEXT, **VIT, "vocab_size": 50}))
    assert list(get_peft_model(model, FacTConfig(rank=4)).get_base_model().factors) == ["32x32"]
