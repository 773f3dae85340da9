"""Settings of every test process and of the processes that tests start."""

import gc
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

# Two threads on tiny models collapse as soon as anything else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from forking import Fork, forking

torch.set_num_threads(1)


def pytest_report_header() -> str:
    """What the tests run with, as docs/versions.md lists it."""
    found = []
    for name in "torch transformers peft accelerate datasets safetensors huggingface_hub timm numpy".split():
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return "versions: " + ", ".join(found)


# A process takes the next file when it has finished one, so the files that take longest come first. Without
# `--no-loadscope-reorder` in pyproject.toml it would be the files with most tests.
LONGEST = """
launchers pages architectures behaviour hub fuzz_verbs image_classification frontier examples exports features
fuzz_config hostile_files
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    position = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: position.get(item.path.name, len(LONGEST)))


@pytest.fixture
def run_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``python -m MODULE ARGUMENT ...`` without the seconds that a new process imports; returns what it prints."""

    def run(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        for name in (module, f"{module}.__main__"):  # else runpy warns
            monkeypatch.delitem(sys.modules, name, raising=False)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """Runs code in a process of its own, which is offline and has not imported fact_peft."""
    home = tmp_path_factory.mktemp("home")
    with forking(home, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "cache")}) as fork:
        yield fork


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_searched_for_garbage():
    """They made a million objects, for which every ``gc.collect()`` of a test would take half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def accelerate_starts_anew():
    """Accelerate keeps the mixed precision of a process for ever; the next file of tests may want another."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
