"""Time and memory of a training step and of inference beside the frozen backbone, PEFT's methods and full fine-tuning.

    python -m benchmarks.speed                       # what is missing of all tables, then tables and plot
    python -m benchmarks.speed --tables step memory
    python -m benchmarks.speed --write benchmarks/README.md

A step is forward, backward and optimizer step of a ViT-B/16 at 224 px with random weights; inference is a forward pass
without gradients. The floor of a step is the backbone frozen but for its head and the biases of the first q, k and v,
so that gradients flow exactly as far as adapters need them; that of inference is the backbone alone. All methods of a
table are built at once and run in turns, round by round; a ratio is the median over rounds of a method's time by the
floor's in that round, with quartiles. With images of 32 px, which are 5 tokens, there is next to nothing to multiply:
what is left is what the calls of a method cost, as they do on a device that is faster than its calls.

On a CPU, times are of the process, not of the clock, so that other work on the machine counts as little as it can, and
one thread is used unless --threads says otherwise. On a GPU, times are of the clock and the model is in bfloat16; that
has not been run yet. Memory is the highest over two steps beyond the built model, each method in a process of its own.
In the table of scaling one thing is varied at a time; "operations" is the ratio that counting multiplications predicts.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from benchmarks.markdown import write_generated
from benchmarks.results import Results
from fact_peft import FacTConfig

COMMAND = "python -m benchmarks.speed"
RESULTS = Path(__file__).parent / "results" / "speed.json"
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
    if name in CONFIGS:
        model = get_peft_model(model, CONFIGS[name](shape.rank))
        for other in range(1, shape.adapters):
            model.add_adapter(f"other{other}", CONFIGS[name](shape.rank))
        if merged:
            model.merge_adapter()
    elif name == FLOOR:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("classifier" in parameter_name or parameter_name in FIRST_BIASES)
    return model.to(DEVICE)


def work(model: nn.Module, shape: Shape, training: bool) -> Callable[[], None]:
    """One step, or one inference pass, as a function to time."""
    images = torch.randn(shape.batch, 3, shape.image, shape.image, device=DEVICE, dtype=DTYPE)
    labels = torch.arange(shape.batch, device=DEVICE)
    model.train(training)
    if not training:
        return torch.no_grad()(lambda: model(pixel_values=images))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(model(pixel_values=images).logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(function: Callable[[], None]) -> float:
    """Of the process on a CPU; of the clock, with everything queued done, on a GPU."""
    if DEVICE == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def time_in_turns(
    methods: Iterable[str], shape: Shape, training: bool, compiled: bool, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every method in every round, as median, and their ratios to the first one's, as quartiles."""
    functions = {}
    for method in methods:
        model = build(method, shape)
        functions[method] = work(torch.compile(model) if compiled else model, shape, training)
        for _ in range(2):  # memory is allocated and graphs are compiled
            functions[method]()
    times: dict[str, list[float]] = {method: [] for method in functions}
    for done in range(rounds):
        for method, function in functions.items():
            times[method].append(seconds(function))
        print(f"round {done + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    floor = next(iter(times.values()))
    measured = {}
    for method, values in times.items():
        ratios = [value / base for value, base in zip(values, floor, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        measured[method] = {
            "seconds": statistics.median(values),
            "fastest": min(values),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "ratio_fastest": min(values) / min(floor),
            "rounds": rounds,
        }
    return measured


def peak_memory(method: str, shape: Shape) -> dict[str, int]:
    """Most bytes in use during two steps beyond the built model. To be called in a fresh process."""
    step = work(build(method, shape), shape, training=True)
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
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def expected_ratio(shape: Shape) -> float:
    """Multiplications of a FacT step by those of the floor's: of the linear layers and of attention, per token.

    A d x e layer takes d e forward and as much backward, where the weight is frozen. Its increment takes r (d + e)
    forward, and twice that backward: once for the input, once for the factors. The two products of attention take
    tokens x width each, and twice that backward. Depth and the number of loaded adapters do not matter.
    """
    d = shape.width
    layers = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
    frozen = 2 * sum(a * b for a, b in layers) + 3 * 2 * shape.tokens * d
    return 1 + 3 * shape.rank * sum(a + b for a, b in layers) / frozen


def measure(
    results: Results,
    tables: Iterable[str],
    shape: Shape,
    scaling: dict[str, list[Shape]],
    memory: Iterable[str],
    rounds: int,
) -> None:
    """Measure what is missing. A table measured in turns is measured whole or not at all."""

    def setting(table: str, method: str, at: Shape) -> dict[str, Any]:
        return {"table": table, "method": method, **asdict(at), "device": DEVICE, "dtype": str(DTYPE)}

    def timed(table: str, methods: list[str], at: Shape, training: bool = True, compiled: bool = False) -> None:
        if all(results.find(**setting(table, method, at)) is not None for method in methods):
            return
        print(f"{table}: {at}", file=sys.stderr)
        for method, measured in time_in_turns(methods, at, training, compiled, rounds).items():
            results.add(setting(table, method, at), measured)
        gc.collect()

    for table, what in TIMED.items():
        if table in tables:
            timed(table, what.methods, what.at(shape), what.training, what.compiled)
    if "memory" in tables:
        for method in memory:
            if results.find(**setting("memory", method, shape)) is None:
                print(f"memory: {method}", file=sys.stderr)
                results.add(setting("memory", method, shape), peak_memory_alone(method, shape))
    if "scaling" in tables:
        for varied, shapes in scaling.items():
            for at in shapes:
                timed(f"scaling: {varied}", [FLOOR, "FacT-TT", "FacT-TK"], at)


def report(results: Results) -> str:
    """All tables in Markdown."""
    frame = results.frame()
    parts = []
    for table in TIMED:
        rows = frame[frame["table"] == table]
        if len(rows):
            parts += [f"**{table}**, batch {rows['batch'].iloc[0]}, seconds and ratio to {FLOOR!r}", ""]
            parts += ["| method | device | seconds | ratio, median | quartiles | ratio of the fastest |"]
            parts += ["|---|---|--:|--:|--:|--:|"]
            for row in rows.itertuples():
                low, high = row.ratio_quartiles
                parts.append(
                    f"| {row.method} | {row.device}, {row.dtype.removeprefix('torch.')} | {row.seconds:.4g} "
                    f"| {row.ratio:.3f} | {low:.3f}-{high:.3f} | {row.ratio_fastest:.3f} |"
                )
            parts.append("")
    rows = frame[frame["table"] == "memory"]
    if len(rows):
        parts += ["**memory** of a step beyond the built model", "", "| method | device | MB |", "|---|---|--:|"]
        parts += [f"| {row.method} | {row.device} | {row.bytes / 1e6:,.0f} |" for row in rows.itertuples()]
        parts.append("")
    rows = frame[frame["table"].str.startswith("scaling") & (frame["method"] != FLOOR)]
    if len(rows):
        parts += ["**scaling** of a step, ratio to the floor", ""]
        parts += ["| varied | value | method | ratio, median | quartiles | operations |", "|---|--:|---|--:|--:|--:|"]
        for row in rows.itertuples():
            varied, (low, high) = row.table.removeprefix("scaling: "), row.ratio_quartiles
            parts.append(
                f"| {varied} | {getattr(row, varied)} | {row.method} | {row.ratio:.3f} | {low:.3f}-{high:.3f} "
                f"| {expected_ratio(shape_of(row)):.3f} |"
            )
        parts.append("")
    return "\n".join(parts)


def shape_of(row: Any) -> Shape:
    return Shape(**{name: int(getattr(row, name)) for name in asdict(SMALL)})


def plot(results: Results, file: Path) -> None:
    """Ratio to the floor against what is varied: points with quartiles, and the line of counted operations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frame = results.frame()
    frame = frame[frame["table"].str.startswith("scaling") & (frame["method"] != FLOOR)]
    tables = list(dict.fromkeys(frame["table"]))
    if not tables:
        return
    figure, panels = pyplot.subplots(1, len(tables), figsize=(3.2 * len(tables), 3), sharey=True, squeeze=False)
    for panel, table in zip(panels[0], tables, strict=True):
        varied = table.removeprefix("scaling: ")
        rows = frame[frame["table"] == table].sort_values(varied)
        for method, of_method in rows.groupby("method"):
            low, high = zip(*of_method["ratio_quartiles"], strict=True)
            errors = [of_method["ratio"] - list(low), list(high) - of_method["ratio"]]
            panel.errorbar(of_method[varied], of_method["ratio"], yerr=errors, marker="o", capsize=3, label=method)
        one = rows.drop_duplicates(varied)
        expected = [expected_ratio(shape_of(row)) for row in one.itertuples()]
        panel.plot(one[varied], expected, "k--", label="operations")
        panel.set_xlabel(varied)
        panel.set_xscale("log", base=2)
        panel.set_xticks(one[varied], [str(value) for value in one[varied]])
        panel.minorticks_off()
    panels[0][0].set_ylabel("step / step of the frozen model")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each table (default: 11)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--results", type=Path, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds; needs --results")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the tables into")
    parser.add_argument("--one-peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.one_peak:
        method, shape = arguments.one_peak
        print(json.dumps(peak_memory(method, Shape(**json.loads(shape)))))
        return
    if arguments.quick and arguments.results is None:
        parser.error("--quick needs --results, so that it does not mix with the real ones.")
    results = Results(arguments.results or RESULTS)
    if arguments.quick:
        measure(results, arguments.tables, TINY, TINY_SCALING, [FLOOR, "FacT-TT"], rounds=2)
    else:
        measure(results, arguments.tables, Shape(), SCALING, STEP, arguments.rounds)
    text = report(results)
    print(text)
    plot(results, results.file.with_name(f"{results.file.stem}_scaling.png"))
    if arguments.write is not None:
        write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
