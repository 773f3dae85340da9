"""The quick modes of the benchmarks of speed, memory and bytes. Nothing here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from benchmarks.bytes import adapter_files
from benchmarks.speed import steps
from benchmarks.speed.report import expected_ratio

ROOT = Path(__file__).parents[1]


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_speed_measures_what_is_missing_and_nothing_else(tmp_path):
    file = tmp_path / "speed.json"
    arguments = ("--quick", "--results", file, "--tables", "step", "inference", "start", "memory", "scaling")
    first = run("benchmarks.speed", *arguments)
    assert first.returncode == 0, first.stderr
    for line in (
        "| FacT-TK | cpu, float32 |",
        "| LoRA, merged | cpu, float32 |",
        "| rank | 4 | FacT-TT |",
        "**memory**",
    ):
        assert line in first.stdout
    assert (tmp_path / "speed_scaling.png").stat().st_size > 5000
    before = file.read_text()
    records = json.loads(before)
    assert len({json.dumps(record["setting"]) for record in records}) == len(records) == 6 + 9 + 4 + 2 + 4 * 3
    assert run("benchmarks.speed", *arguments).stdout == first.stdout
    assert file.read_text() == before


@pytest.mark.parametrize("module", ["benchmarks.speed", "benchmarks.bytes"])
def test_quick_results_do_not_mix_with_real_ones(module, run_module, capsys, monkeypatch):
    monkeypatch.setattr(logging, "set_verbosity_error", lambda: None)  # for a process of its own
    with pytest.raises(SystemExit, match="2"):
        run_module(module, "--quick")
    assert "--quick needs --results" in capsys.readouterr().err


def test_expected_ratio_is_what_torch_counts():
    # Of LoRA, since torch counts no in-place product, and FacT's are as many.
    shape = steps.Shape(width=128, depth=2, rank=8, image=32, batch=2)
    counts = {}
    for method in (steps.FLOOR, "LoRA"):
        step = steps.work(steps.build(method, shape), shape, training=True)
        with FlopCounterMode(display=False) as counter:
            step()
        counts[method] = counter.get_total_flops()
    # Patches, head and the first q, k and v, whose input needs no gradient, are not in the formula: 5 % of this model.
    assert counts["LoRA"] / counts[steps.FLOOR] == pytest.approx(expected_ratio(shape), rel=0.05)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_bytes_on_disk_are_numbers_header_and_config(tmp_path, run_module):
    file = tmp_path / "bytes.json"
    run_module("benchmarks.bytes", "--quick", "--results", file)
    found = {record["setting"]["method"]: record["measured"] for record in json.loads(file.read_text())}
    assert found.keys() == adapter_files.METHODS.keys()
    # U and V of 32 x 4 and a core of 24 x 4 x 4; LoRA's A and B in 2 blocks of 4 square and 2 longer layers.
    assert found["FacT-TT"]["numbers"] == 4 * (2 * 32 * 4 + 24 * 4 * 4)
    assert found["LoRA"]["numbers"] == 4 * 2 * 4 * (4 * 64 + 2 * 160)
    assert all(measured["header"] > 0 and measured["config"] > 0 for measured in found.values())
