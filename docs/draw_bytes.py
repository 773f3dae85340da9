"""Draws the pictures of bytes on disk in docs/pictures.

    python -m docs.draw_bytes

``accuracy_by_bytes.png`` shows results of `benchmarks.frontier.bytes`. A point is one method in one storage, and its
mean test accuracy over three tasks against the bytes of adapter, head and config. ``bytes_by_storage.png`` shows what
`benchmarks.bytes.storage_sizes` computes for one adapter.
"""

from pathlib import Path

from benchmarks.bytes.storage_sizes import NUM_LABELS, adapted, measure
from benchmarks.frontier.bytes.report import read, summary
from benchmarks.frontier.bytes.storing import AS_TRAINED
from docs.drawing import OURS, OURS_TOO, THEIRS, THEIRS_TOO, name, save, start

RESULTS = Path(__file__).parents[1] / "benchmarks" / "frontier" / "bytes" / "results" / "vit-s14-tiny-imagenet"
# Of every method its name, where the name stands, its colour, and the offsets of the names of its storages.
LINES = {
    "FacT-TT r=4": ("FacT-TT r=4", (6.1e3, 85.4), OURS, [(0, 8), (0, 8), (0, 8), (0, -19)]),
    "FacT-TT r=16, orthogonal": ("FacT-TT r=16 (the default)", (6.6e4, 84.4), OURS_TOO, [(0, -19)] * 4),
    "LoRA r=1": ("LoRA r=1", (1.6e5, 87.1), THEIRS, [(0, 8)] * 4),
    "linear probe": ("linear probe", (8.2e3, 77.9), THEIRS_TOO, [(0, 8)]),
}
BITS = {"float32 float32": "32 bits", "int8 int8": "8", "int4 int4": "4", "int2 int4": "2"}  # of factors and head
STORAGES = [("float32", None), ("float16", None), ("int8", None), ("int4", None), ("int4", "int4"), ("int2", "int2")]


def draw_accuracy() -> None:
    rows = summary(read(RESULTS))
    plain = rows[rows["form"] == AS_TRAINED]
    shown = plain[(plain["storage"] + " " + plain["head_storage"]).isin(BITS)]
    figure, axes = start()
    for method, (text, place, colour, offsets) in LINES.items():
        line = shown[shown["method"] == method].sort_values("bytes")
        print(method, line[["storage", "head_storage", "bytes", "mean"]].to_string(index=False), sep="\n")
        axes.plot(line["bytes"], line["mean"], "o-", color=colour, markersize=7)
        for row, offset in zip(line.itertuples(), offsets, strict=True):
            name(
                axes,
                BITS[f"{row.storage} {row.head_storage}"],
                (row.bytes, row.mean),
                offset,
                color=colour,
                ha="center",
            )
        axes.annotate(text, place, color=colour, weight="bold", fontsize=12)
    axes.errorbar(3.2e5, 80, 1.0, color="black", capsize=3)
    axes.annotate("sampling error\nof a point", (2.8e5, 80), ha="right", va="center", fontsize=12)
    axes.set(xscale="log", xlim=(5e3, 6e5), ylim=(77, 88), ylabel="test accuracy, %")
    axes.set_xticks([1e4, 1e5], ["10 KB", "100 KB"])
    axes.set_xlabel("size of a task on disk: adapter, head and config")
    save(figure, axes, "FacT r=4 loses no accuracy in 4 bits, at 8 KB per task", "accuracy_by_bytes.png")


def draw_storages() -> None:
    model = adapted("tt", 8, NUM_LABELS)
    config = model.peft_config["default"]
    figure, axes = start(height=3.9)
    names = []
    for row, (factors, head) in enumerate(STORAGES):
        config.storage, config.head_storage = factors, head
        taken = measure(model)
        parts = {"factors": taken.factors, "head": taken.others, "names and config": taken.header + taken.config}
        left = 0
        for (part, size), colour in zip(parts.items(), (OURS, THEIRS_TOO, "black"), strict=True):
            axes.barh(row, size / 1e3, left=left / 1e3, color=colour, label=part if row == 0 else None)
            left += size
        name(axes, f"{taken.total / 1e3:.0f} KB", (taken.total / 1e3, row), (5, 0), va="center")
        names.append(factors if config.storage_of_heads == factors else f"{factors}, head {config.storage_of_heads}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 460), xlabel="KB per task")
    axes.legend(loc="lower right", fontsize=12, frameon=False)
    save(figure, axes, f"With {NUM_LABELS} classes, most of a file is the head", "bytes_by_storage.png", grid="x")


if __name__ == "__main__":
    draw_accuracy()
    draw_storages()
