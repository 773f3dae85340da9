"""The first steps of every script: read the command line, and connect the processes of a launcher."""

import os
import sys
from dataclasses import field, fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers import HfArgumentParser

WITHOUT_GPU = "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2"


def flag(default: Any, text: str, *choices: Any) -> Any:
    """A dataclass field with a default, a help text and, if there are any, the allowed values."""
    return field(default=default, metadata={"help": text, **({"choices": list(choices)} if choices else {})})


def parse(*classes: type, defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """Read the command line into an instance of each dataclass.

    Args:
        classes: Dataclasses, one flag per field.
        defaults: Values that replace those of the classes.

    Raises:
        SystemExit: If a flag is unknown. The message names the most similar flag.
    """
    parser = HfArgumentParser(classes, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**defaults or {})
    *parsed, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    flags = [f"--{field.name}" for one in classes for field in fields(one) if field.init]
    for word in rest:
        near = get_close_matches(word.partition("=")[0].replace("-", "_").replace("__", "--", 1), flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags."
        raise SystemExit(f"unknown argument {word}: {hint}")
    return tuple(parsed)


def connect_processes() -> None:
    """Let the processes of a launcher train together, over gloo, on a machine without a GPU.

    accelerate connects processes without a GPU only if it is told to use the CPU. Otherwise each would train alone.

    Raises:
        SystemExit: If the launcher asks for FSDP or DeepSpeed, which accelerate runs on GPUs only.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if (device is not None and device.type != "mps") or "ACCELERATE_TORCH_DEVICE" in os.environ:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
            raise SystemExit(
                "accelerate runs FSDP and DeepSpeed on GPUs only, and this machine has none. For data-parallel "
                f"training on the CPU: {WITHOUT_GPU} {sys.argv[0]} ..."
            )
        os.environ["ACCELERATE_USE_CPU"] = "1"
    elif os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":  # as `accelerate launch` writes it
        print(
            "`accelerate launch --cpu` has started one process, as it always does, whatever --num_processes says. "
            f"For two processes: {WITHOUT_GPU} {sys.argv[0]} ...",
            file=sys.stderr,
        )
