"""Settings of every test process and of the processes that tests start."""

import os
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

# Two threads on tiny models collapse as soon as anything else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_report_header() -> str:
    """What the tests run with, as docs/versions.md lists it."""
    found = []
    for name in "torch transformers peft accelerate datasets safetensors huggingface_hub timm numpy".split():
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return "versions: " + ", ".join(found)


@pytest.fixture
def run_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``python -m MODULE ARGUMENT ...`` without the seconds that a new process imports; returns what it prints."""

    def run(module: str, *arguments: object) -> str:
        if module == "fact_peft":
            pytest.importorskip("PIL", reason="No module named 'PIL', which `python -m fact_peft` imports")
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        for name in (module, f"{module}.__main__"):  # else runpy warns
            monkeypatch.delitem(sys.modules, name, raising=False)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module", autouse=True)
def accelerate_starts_anew():
    """Accelerate keeps the mixed precision of a process for ever; the next file of tests may want another."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
