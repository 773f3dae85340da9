"""Latency and throughput of examples/serving under an open-loop load, beside one adapter and beside swapping adapters.

    python -m benchmarks.serving                                        # what is missing, then table and plot
    python -m benchmarks.serving --write benchmarks/serving/MEASURED.md

Served is a ViT-Ti (192 x 12) at 96 px with random weights, by one replica with one torch thread, on loopback. The load
generator is `open_loop.py` (asyncio and aiohttp), in a process of its own on the same machine: JPEG pictures at a fixed
rate, each request for one adapter, latency from the moment a request was due. Each rate lasts --seconds; a line ends
with the first rate at which less than nine tenths were answered in time or p95 is above two seconds, since an open loop
beyond that measures its own duration. A rate begins only after the answers of the one before.

- pool: `AdapterPool` with 1,000 FacT-TT adapters of rank 8, all resident, requested uniformly or by Zipf's law.
- one adapter: the same service and ViT with one of them, as PEFT's active adapter, in the pool's place.
- PEFT, swapping: the same 1,000 folders; PEFT's `set_adapter` for each adapter of a batch, `load_adapter` for one that
  is not among the last 32.
"""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import torch

from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results
from benchmarks.serving.baselines import make_swapping
from benchmarks.serving.open_loop import send, uniform, zipf
from benchmarks.serving.report import plot, report
from benchmarks.serving.workload import pictures, save_adapters, save_backbone

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "serving.json"
COMMAND = "python -m benchmarks.serving"
RATES = [5, 10, 20, 40, 60, 80, 100, 120, 160]
DRAWS = {"uniform": uniform, "Zipf": zipf}


@dataclass(frozen=True)
class Line:
    """One thing that is served, and how its adapters are asked for."""

    served: str
    requests: str
    num_adapters: int


LINES = [
    Line("pool", "uniform", 1000),
    Line("pool", "Zipf", 1000),
    Line("one adapter", "uniform", 1),
    Line("PEFT, swapping", "uniform", 1000),
    Line("PEFT, swapping", "Zipf", 1000),
]


def measure(results: Results, lines: list[Line], rates: list[float], seconds: float, folder: Path, port: int) -> None:
    """Measure what is missing; whatever is served alike is deployed once."""
    sys.path.append(str(ROOT / "examples" / "serving"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of the replicas
    import ray
    from catalogue import Catalogue
    from ray import serve
    from serve import start_ray
    from service import Service, make_pool
    from settings import Settings

    save_backbone(folder / "backbone")
    names = save_adapters(folder / "backbone", folder / "adapters", max(line.num_adapters for line in lines))
    images = pictures(8)
    url = f"http://127.0.0.1:{port}"
    deployed = None
    try:
        for line in lines:
            what = line.served, line.num_adapters
            for rate in rates:
                setting = {**vars(line), "rate": rate, "seconds": seconds}
                measured = results.find(**setting)
                if measured is None:
                    if deployed != what:
                        settings = Settings(
                            backbone=str(folder / "backbone"), state=str(folder / f"state of {what}"), port=port
                        )
                        catalogue = Catalogue(Path(settings.state))
                        for name in names[: line.num_adapters]:
                            catalogue.put(name, folder / "adapters" / name, name)
                        if not ray.is_initialized():
                            start_ray(settings)
                            serve.start(http_options={"host": settings.host, "port": port})
                        pool = make_pool if line.served == "pool" else make_swapping
                        serve.run(Service.bind(settings, None, pool), logging_config={"enable_access_log": False})
                        asyncio.run(send(url, images, names[:1] * 20, 5))  # first passes are slow
                        deployed = what
                    measured = load(url, images, names[: line.num_adapters], line.requests, rate, seconds)
                    results.add(setting, measured)
                    print(f"{line.served}, {line.requests}, {rate} a second: {measured}", file=sys.stderr)
                late = measured["throughput"] < 0.9 * rate or measured["unanswered"]
                if late or measured["p95"] > 2000:
                    break
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def load(url: str, images: list[bytes], names: list[str], requests: str, rate: float, seconds: float) -> dict:
    """One rate; beside what the client saw, how many images the service took into a batch on average."""
    indices = DRAWS[requests](len(names), round(rate * seconds), seed=round(rate))
    before = totals(url)
    measured = asyncio.run(send(url, images, [names[index] for index in indices], rate))
    batches, pairs = (after - old for after, old in zip(totals(url), before, strict=True))
    measured["batch"] = pairs / max(1, batches)
    return measured


def totals(url: str) -> tuple[int, int]:
    """Batches and images of the one replica so far."""
    with urlopen(f"{url}/health") as answer:
        health = json.load(answer)
    return health["batches"], health["pairs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of every rate (default: 8)")
    served = list(dict.fromkeys(line.served for line in LINES))
    parser.add_argument("--served", nargs="+", choices=served, default=served, help="what to measure (default: all)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help=f"requests a second (default: {RATES})")
    parser.add_argument("--adapters", type=int, help="at most so many adapters (for a try)")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the replica
    results = Results(arguments.results)
    lines = [
        Line(line.served, line.requests, min(line.num_adapters, arguments.adapters or line.num_adapters))
        for line in LINES
        if line.served in arguments.served
    ]
    with TemporaryDirectory() as folder:
        measure(results, lines, arguments.rates, arguments.seconds, Path(folder), arguments.port)
    text = report(results)
    print(text)
    plot(results, arguments.results.with_suffix(".png"))
    if arguments.write:
        write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
