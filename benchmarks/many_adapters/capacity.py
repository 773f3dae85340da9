"""What it costs to keep adapters: bytes of the process, and the time to load one more."""

import ctypes
import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.many_adapters.batches import RANK, Shape, fact, lora
from fact_peft import AdapterPool

ADAPTERS, TINY_ADAPTERS = 10_000, 20
LIMIT_S, LIMIT_BYTES = 60, 6e9


def process_bytes() -> int:
    """What the process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(load: Callable[[str], Any], adapters: int) -> dict[str, Any]:
    """Load adapters until there are so many, or the limit of time or memory is reached."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed while building would be taken first, and not be counted
    before, started, seconds = process_bytes(), time.perf_counter(), []
    while len(seconds) < adapters and time.perf_counter() < started + LIMIT_S:
        if process_bytes() > before + LIMIT_BYTES:
            break
        begun = time.perf_counter()
        load(str(len(seconds)))
        seconds.append(time.perf_counter() - begun)
    tail = max(1, len(seconds) // 100)
    every = max(1, len(seconds) // 200)
    starts = range(0, len(seconds) - every + 1, every)
    return {
        "adapters": len(seconds),
        "bytes": process_bytes() - before,
        "first_ms": 1e3 * seconds[0],
        "last_ms": 1e3 * sorted(seconds[-tail:])[tail // 2],
        "slowest_ms": 1e3 * max(seconds),
        "curve": [[i + 1, round(1e3 * sorted(seconds[i : i + every])[every // 2], 3)] for i in starts],
    }


def in_a_process(fill: Callable[[Shape, int], dict[str, Any]], shape: Shape, adapters: int) -> dict[str, Any]:
    """What `fill` measures in a fresh process with as many threads, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as process:
        return process.submit(fill, shape, adapters).result()


def fill_pool(shape: Shape, adapters: int) -> dict[str, Any]:
    """Load an adapter of FacT under many names."""
    with TemporaryDirectory() as folder:
        model = get_peft_model(shape.model(), fact(RANK))
        model.save_pretrained(folder)
        del model
        pool = AdapterPool(shape.model())
        measured = timed(lambda name: pool.load(name, folder), adapters)
        return {**measured, "raw_bytes": pool.stats()["bytes"]}


def fill_peft(shape: Shape, adapters: int) -> dict[str, Any]:
    """Load a LoRA of the same rank on the same layers into one model, as far as it gets."""
    with TemporaryDirectory() as folder:
        model = get_peft_model(shape.model(), lora(RANK))
        model.save_pretrained(folder)
        raw = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        measured = timed(partial(model.load_adapter, folder), adapters)
        return {**measured, "raw_bytes": raw * measured["adapters"]}
