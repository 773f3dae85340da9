"""Settings of every test process and of the processes that tests start."""

import os
from importlib.metadata import version

# Two threads on tiny models collapse as soon as anything else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


def pytest_report_header() -> str:
    """What the tests run with, as docs/versions.md lists it."""
    names = "torch transformers peft accelerate datasets safetensors huggingface_hub timm numpy".split()
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in names)
