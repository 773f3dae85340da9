"""The code of docs/vision_towers.md runs as it stands, in order, on tiny models in the place of those of the Hub."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VIT
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

DOCS = Path(__file__).parents[1] / "docs"
SIZE = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def blocks(page: str) -> list[str]:
    """The Python of a page, each block behind as many empty lines as put errors at the right line of the page."""
    text = (DOCS / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the blocks of a page leave behind, run in order as one program that begins with `names`."""
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


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
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page leaves behind, given 40 handwritten digits as its images."""
    digits = load_digits()
    images = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[:40]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("towers"))
        save_towers()
        return run("vision_towers.md", {"images": images, "labels": torch.as_tensor(digits.target[:40])})


def test_the_page_runs(page: dict[str, Any]) -> None:
    print(page.keys())
