"""Functions timed in turns, round by round, so that whatever else the machine does meets all of them alike."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    """Of the process on a CPU; of the clock, with everything queued done, on a GPU."""
    if not torch.cuda.is_available():
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def time_in_turns(functions: Mapping[str, Callable[[], Any]], reference: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of every function, and its ratio to that of `reference` in the same round, with quartiles."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(rounds):
        for name, function in functions.items():
            gc.collect()
            times[name].append(seconds(function))
        print(f"round {done + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    measured = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        measured[name] = {
            "seconds": statistics.median(values),
            "fastest": min(values),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "ratio_fastest": min(values) / min(times[reference]),
            "rounds": rounds,
        }
    return measured
