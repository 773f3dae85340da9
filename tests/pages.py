"""A page of the documentation as one program: its Python as it stands, its shell commands as far as can be checked.

Line n of the program is line n of the page. Every page begins in an empty folder with pictures in `photos/`, and knows
`images`, a list of PIL images, and `labels`, a tensor with the number of the class of each.
"""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from torch import nn

__all__ = ["images", "labels", "shell", "start"]  # what a page knows

ROOT = Path(__file__).parents[1]
LANGUAGES = {"python", "bash", "json", "text", "bibtex", "{toctree}", "{eval-rst}"}
CLASSES = {"cat": "sienna", "dog": "gold", "owl": "slategrey"}

START = "from pages import *; start();"


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Index of the line of the fence, language and text of every block of code."""
    lines = page.splitlines()
    fences = [index for index, line in enumerate(lines) if re.match(r"\s*```", line)]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        if lines[begin].startswith(" "):
            raise ValueError(f"line {begin + 1}: a block of code in a list is not executed; move it to the margin.")
        yield begin, lines[begin].removeprefix("```").strip(), "\n".join(lines[begin + 1 : end])


def program(page: str) -> str:
    """The page as Python; empty if there is nothing to run."""
    lines = [""] * len(page.splitlines())
    for begin, language, text in blocks(page):
        if language == "python":
            lines[begin + 1 : begin + 1 + len(text.splitlines())] = text.splitlines()
        elif language == "bash":
            lines[begin] = f"shell({text!r})"
    if not any(lines):
        return ""
    lines[0] = START + lines[0]
    return "\n".join(lines)


# What the pages call by a name on the Hub is a tiny model with random weights here.

SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**SHAPE, "intermediate_size": 64}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TIMM = "timm/vit_small_patch16_224.augreg_in21k"
SIZE = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}


def siglip() -> nn.Module:
    text = {**TEXT, "vocab_size": 50, "projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VIT, text_config=text))


def clip_tokens() -> list[str]:
    characters = [chr(code) for code in range(33, 127)]
    return [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]


def clip() -> nn.Module:
    last = len(clip_tokens()) - 1
    text = {**TEXT, "vocab_size": last + 1, "eos_token_id": last}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VIT, text_config=text, projection_dim=16))


def clip_processor() -> Any:
    vocabulary = {token: index for index, token in enumerate(clip_tokens())}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(**SIZE), tokenizer)


def vit(num_labels: int) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=num_labels))


def timm_wrapper() -> nn.Module:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=1000,
        model_args=settings,
        pretrained_cfg={"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
    )
    return transformers.TimmWrapperForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "facebook/dinov2-base": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)),
    "facebook/dinov2-small": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)),
    "facebook/dinov3-vits16-pretrain-lvd1689m": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**VIT)
    ),
    "google/siglip-base-patch16-224": siglip,
    "google/vit-base-patch16-224": lambda: vit(1000),
    "google/vit-base-patch16-224-in21k": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
    "me/dinov2-small-float16": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)).half(),
    "openai/clip-vit-base-patch32": clip,
    TIMM: timm_wrapper,
}
PROCESSORS: dict[str, Callable[[], Any]] = {"openai/clip-vit-base-patch32": clip_processor}


def save_model(name: str, folder: Path) -> None:
    """The tiny model of this name, with its processor."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    if name != TIMM:  # whose image processor is in the config of the model
        processor = PROCESSORS.get(name, lambda: transformers.ViTImageProcessor(size=SIZE["size"]))
        processor().save_pretrained(folder)


def start() -> None:
    """What every page begins with, in the process and in the folder of its own."""
    torch.manual_seed(0)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = Path("photos", list(CLASSES)[label])
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    create_model = timm.create_model
    timm.create_model = lambda name, pretrained=False, **settings: create_model(name, **settings)


images = [Image.new("RGB", (40, 40), colour) for _ in range(8) for colour in CLASSES.values()]
labels = torch.arange(len(images)) % len(CLASSES)


# Commands


def shell(block: str) -> None:
    """Run or check every command of a block.

    Raises:
        ValueError: If a command is wrong, or nothing here knows how to check it.
    """
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        for is_separator, group in groupby(words, key=lambda word: set(word) <= set(";&|")):
            command = list(group)
            while command and re.match(r"[A-Z_]+=", command[0]):
                del command[0]
            if command and not is_separator:
                check(command)


def check(command: list[str]) -> None:
    match command:
        case ["pip", "install", *rest]:
            check_install(rest)
        case ["python", "-m", "fact_peft", "convert", *rest]:
            check_options("fact_peft", rest, "convert")
        case ["python", "-m", "fact_peft", *rest]:
            run("fact_peft", rest)
        case ["python", "-m", "pytest" | "build", *_]:
            pass
        case ["python", "-m", module, *rest]:
            check_options(module, rest)
        case ["python", file, *rest]:
            check_options(file, rest)
        case ["torchrun", "--nproc_per_node", _, file, *rest]:
            check_options(file, rest)
        case ["accelerate", "launch", *rest]:
            check_launch(rest)
        case ["bash", ".ci/run"] | ["ruff" | "mypy" | "sphinx-build" | "twine" | "git" | "curl" | "serve", *_]:
            pass
        case ["ray", "start", *_] | ["docker", "build" | "run", *_]:
            pass
        case _:
            raise ValueError(f"Nothing checks the command {shlex.join(command)!r}; teach tests/pages.py to do so.")


def check_install(words: list[str]) -> None:
    """Extras must be those of pyproject.toml, and other packages those of constraints.txt."""
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    for word in words:
        name, _, asked = word.rstrip("]").partition("[")
        if word.startswith("-") or name == "constraints.txt":
            continue
        if name not in (".", "fact-peft", *pinned) or not {*filter(None, asked.split(","))} <= {*extras}:
            raise ValueError(f"{word!r} is neither a package of constraints.txt nor an extra of pyproject.toml.")


def run(program: str, arguments: list[str]) -> None:
    """A module, or a file of the repository, as ``python -m`` and ``python`` run it."""
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str((ROOT / program).parent))
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@functools.cache
def options(program: str, *subcommand: str) -> set[str]:
    """Those that ``--help`` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        run(program, [*subcommand, "--help"])
    return set(re.findall(r"--[\w-]+", output.getvalue()))


def check_options(program: str, arguments: list[str], *subcommand: str) -> None:
    asked = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    unknown = asked - options(program, *subcommand)
    if unknown:
        raise ValueError(f"{program} does not know {', '.join(sorted(unknown))}.")


def check_launch(arguments: list[str]) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(arguments)
    if asked.config_file:
        load_config_from_file(str(ROOT / asked.config_file))
    check_options(asked.training_script, asked.training_script_args)
