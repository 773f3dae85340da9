"""The quick mode of the benchmark of many adapters. Nothing here looks at a time."""

import json

import pytest
import torch
from transformers.utils import logging

from benchmarks.many_adapters import batches


@pytest.mark.slow
def test_it_measures_what_is_missing_and_nothing_else(run_module, monkeypatch, tmp_path):
    monkeypatch.setattr(logging, "set_verbosity_error", lambda: None)  # for a process of its own
    file = tmp_path / "many_adapters.json"
    arguments = ("--quick", "--threads", "1", "--results", str(file))
    first = run_module("benchmarks.many_adapters", *arguments)
    for row in (
        "FacT, 1",
        "FacT, 4",
        "FacT, 4, ranks 4 8 16",
        "AdapterPool, 4",
        "LoRA, 4",
        "a step of all tasks",
        "PEFT, LoRA",
    ):
        assert f"| {row} |" in first
    assert file.with_suffix(".png").stat().st_size > 5000
    records = file.read_text()
    assert len(json.loads(records)) == 7 + 5 + 2
    assert run_module("benchmarks.many_adapters", *arguments) == first and file.read_text() == records


@torch.no_grad()
def test_what_is_timed_has_as_many_adapters_as_it_says():
    torch.manual_seed(0)
    rows = batches.rows_of(batches.TINY["tiny"])
    for method in ("FacT", "LoRA"):
        several, one = rows[f"{method}, 4"](), rows[f"{method}, 1"]()
        torch.testing.assert_close(several.logits[0], one.logits[0])  # of adapter 0, which is active
        assert all((several.logits[i] - one.logits[i]).abs().max() > 1e-4 for i in range(1, 4))
    pooled = torch.stack([prediction.logits for prediction in rows["AdapterPool, 4"]()])
    assert pooled.shape == several.logits.shape
