"""What is timed: a training step or an inference pass of an adapted ViT, and how its seconds and bytes are taken."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.reporting.timing import time_in_turns
from fact_peft import FacTConfig, initialize_from_gradients

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
HEAD = ["classifier"]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
FLOOR = "frozen"
FIRST_BIASES = [f"vit.layers.0.attention.{name}.bias" for name in ("q_proj", "k_proj", "v_proj")]

CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    "FacT-TT": lambda rank: FacTConfig(rank=rank, init_weights=False),
    "FacT-TK": lambda rank: FacTConfig(rank=rank, decomposition="tk", init_weights=False),
    "LoRA": lambda rank: LoraConfig(r=rank, target_modules=LINEARS, modules_to_save=HEAD),
    "VeRA": lambda rank: VeraConfig(r=rank, target_modules=LINEARS, modules_to_save=HEAD),
}
STEP = [FLOOR, *CONFIGS, "full"]
START = "start from gradients"  # of FacT-TT, from one batch
BESIDE_START: dict[str, Callable[[int], PeftConfig]] = {
    START: lambda rank: FacTConfig(rank=rank),
    "LoRA r=8": lambda rank: LoraConfig(r=8, target_modules=LINEARS, modules_to_save=HEAD),
}
INFERENCE = [FLOOR, *CONFIGS, *(f"{method}, merged" for method in CONFIGS)]
CHIEF = [FLOOR, "FacT-TT", "FacT-TK", "LoRA"]


@dataclass(frozen=True)
class Shape:
    """A ViT and a batch for it. Heads are 64 wide, the MLP is four times as wide as the rest."""

    width: int = 768
    depth: int = 12
    rank: int = 16
    adapters: int = 1
    image: int = 224
    patch: int = 16
    batch: int = 4

    @property
    def tokens(self) -> int:
        """Of one image, with the class token."""
        return (self.image // self.patch) ** 2 + 1

    def config(self) -> ViTConfig:
        return ViTConfig(
            image_size=self.image,
            patch_size=self.patch,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=max(1, self.width // 64),
            intermediate_size=4 * self.width,
            num_labels=100,
        )


class Timed(NamedTuple):
    """A table of times: which methods, at which multiple of the batch, and what they do."""

    methods: list[str]
    training: bool
    batches: int = 1
    image: int | None = None
    compiled: bool = False

    def at(self, shape: Shape) -> Shape:
        return replace(shape, batch=self.batches * shape.batch, image=self.image or shape.image)


TIMED = {
    "step": Timed(STEP, training=True),
    "inference": Timed(INFERENCE, training=False),
    "step, 5 tokens an image": Timed(CHIEF, training=True, image=32),
    "inference, 5 tokens an image": Timed(CHIEF, training=False, image=32),
    "inference, larger batch": Timed(CHIEF, training=False, batches=4),
    "compiled step": Timed(CHIEF, training=True, compiled=True),
    "compiled inference": Timed(CHIEF, training=False, compiled=True),
    "start": Timed([FLOOR, "FacT-TT", *BESIDE_START], training=True),
}
TABLES = (*TIMED, "memory", "scaling")
SMALL = Shape(width=384, depth=4, batch=4)  # what is varied in the table of scaling, so that it takes minutes
SCALING = {
    "rank": [replace(SMALL, rank=rank) for rank in (4, 16, 32, 64)],
    "depth": [replace(SMALL, depth=depth) for depth in (2, 4, 8)],
    "width": [replace(SMALL, width=width) for width in (192, 384, 768)],
    "adapters": [replace(SMALL, adapters=adapters) for adapters in (1, 4, 16)],
}
TINY = Shape(width=64, depth=1, rank=2, image=32, batch=1)
TINY_SCALING = {"rank": [TINY, replace(TINY, rank=4)], "adapters": [TINY, replace(TINY, adapters=2)]}


def build(method: str, shape: Shape) -> nn.Module:
    """The backbone, adapted, with what the method trains requiring gradients; `shape.adapters` are loaded, one used."""
    torch.manual_seed(0)
    model: nn.Module = ViTForImageClassification(shape.config()).to(DEVICE, DTYPE)
    name, _, merged = method.partition(", ")
    configs = {**CONFIGS, **BESIDE_START}
    if name in configs:
        model = get_peft_model(model, configs[name](shape.rank))
        for other in range(1, shape.adapters):
            model.add_adapter(f"other{other}", configs[name](shape.rank))
        if merged:
            model.merge_adapter()
    elif name == FLOOR:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("classifier" in parameter_name or parameter_name in FIRST_BIASES)
    return model.to(DEVICE)


def work(model: nn.Module, shape: Shape, training: bool, method: str = FLOOR) -> Callable[[], None]:
    """One step, one start from a batch, or one inference pass, as a function to time."""
    images = torch.randn(shape.batch, 3, shape.image, shape.image, device=DEVICE, dtype=DTYPE)
    labels = torch.arange(shape.batch, device=DEVICE)
    model.train(training)
    if not training:
        return torch.no_grad()(lambda: model(pixel_values=images))
    if method == START:
        batch = {"pixel_values": images, "labels": labels}
        return lambda: initialize_from_gradients(model, [batch], show_progress_bar=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(model(pixel_values=images).logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_methods(
    methods: Iterable[str], shape: Shape, training: bool, compiled: bool, rounds: int
) -> dict[str, dict[str, Any]]:
    """What `time_in_turns` says of every method, with ratios to the first one's."""
    functions = {}
    for method in methods:
        model = build(method, shape)
        functions[method] = work(torch.compile(model) if compiled else model, shape, training, method)
        for _ in range(2):  # memory is allocated and graphs are compiled
            functions[method]()
    return time_in_turns(functions, next(iter(functions)), rounds)


def peak_memory(method: str, shape: Shape) -> dict[str, int]:
    """Most bytes in use during two steps beyond the built model. To be called in a fresh process."""
    step = work(build(method, shape), shape, training=True, method=method)
    gc.collect()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        before = high_water_mark()
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else high_water_mark()
    return {"bytes": peak - before}


def high_water_mark() -> int:
    """Most bytes that were resident. Unlike ``ru_maxrss`` it can be reset and does not start at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory_alone(method: str, shape: Shape) -> dict[str, int]:
    """`peak_memory` in a process of its own, which allocates in the same way whatever ran before."""
    command = [sys.executable, "-m", "benchmarks.speed", "--one-peak", method, json.dumps(asdict(shape))]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])
