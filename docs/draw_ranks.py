"""Draws the pictures of ranks and decompositions in docs/pictures.

    python -m docs.draw_ranks

``size_by_rank.png`` shows the bytes of an adapter without a head, from results of `benchmarks.bytes`.
``accuracy_by_rank.png`` shows results of `benchmarks.frontier.toy`: the mean test accuracy over five tasks and three
seeds, for each rank with the best of three learning rates on each task. A bar is the standard deviation over seeds.
"""

from pathlib import Path

from benchmarks.frontier.report import chosen, means, read
from benchmarks.reporting.results import Results
from docs.drawing import OURS, OURS_TOO, THEIRS, name, save, start

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = {"FacT-TT": (OURS, (0, 9)), "FacT-TK": (OURS_TOO, (0, -19)), "LoRA": (THEIRS, (0, 9))}
# Of every decomposition its colour, and the ranks with where their names stand.
ACCURACIES = {
    "TT": (OURS, {2: (9, -8), 4: (10, -14), 8: (10, -16), 16: (0, 20)}),
    "TK": (OURS_TOO, {4: (-8, 7), 8: (-8, 7), 12: (-8, 7), 16: (-8, 10), 32: (0, -128)}),
}


def size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count > 1e6 else f"{count / 1e3:.0f} KB"


def draw_sizes() -> None:
    measured = Results(BENCHMARKS / "bytes" / "results" / "adapter_bytes.json").frame()
    rows = measured[measured["backbone"] == "ViT-B/16"].assign(bytes=lambda rows: rows["numbers"] + rows["header"])
    figure, axes = start()
    for method, (colour, offset) in SIZES.items():
        line = rows[rows["method"] == method].sort_values("rank")
        axes.plot(line["rank"], line["bytes"], "o-", color=colour, markersize=7)
        for row in line.itertuples():
            name(axes, size(row.bytes), (row.rank, row.bytes), offset, color=colour, ha="center")
        last = line.iloc[-1]
        name(axes, method, (last["rank"], last["bytes"]), (30, 0), color=colour, weight="bold", va="center")
    axes.set(xscale="log", yscale="log", xlim=(3.2, 62), ylim=(1.1e4, 6e7))
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.set_yticks([1e5, 1e6, 1e7], ["100 KB", "1 MB", "10 MB"])
    axes.set(xlabel="rank", ylabel="adapter of a ViT-B/16 in float32")
    at_16 = rows[rows["rank"] == 16].set_index("method")["bytes"]
    share = at_16["FacT-TK"] / at_16["FacT-TT"]
    save(figure, axes, f"At rank 16, FacT-TK has {100 * share:.0f} % of the size of FacT-TT", "size_by_rank.png")


def draw_accuracies() -> None:
    runs = chosen(read(BENCHMARKS / "frontier" / "toy" / "results"))
    points = means(runs, sorted(set(runs["task"]))).set_index("method")
    figure, axes = start()
    for decomposition, (colour, ranks) in ACCURACIES.items():
        line = points.loc[[f"FacT-{decomposition} r={rank}, orthogonal" for rank in ranks]]
        print(line[["parameters", "mean", "std"]].to_string())
        axes.errorbar(line["parameters"], line["mean"], line["std"], color=colour, marker="o", markersize=7, capsize=3)
        for (rank, offset), point in zip(ranks.items(), line.itertuples(), strict=True):
            where = point.parameters, point.mean
            text = f"{decomposition} r={rank}" + (" (one of three\nseeds did not train)" if rank == 32 else "")
            text += "\n(the default)" if (decomposition, rank) == ("TT", 16) else ""
            alignment = "left" if offset[0] > 2 else "center" if offset[0] >= 0 else "right"
            name(axes, text, where, offset, color=colour, ha=alignment)
    axes.set(xscale="log", xlim=(250, 1.2e5), ylim=(46, 63), ylabel="test accuracy on five toy tasks, %")
    axes.set_xticks([1e3, 1e4, 1e5], ["1,000", "10,000", "100,000"])
    axes.set_xlabel("trained parameters, without the head")
    tt, tk = (points.loc[f"FacT-{decomposition} r=16, orthogonal"] for decomposition in ("TT", "TK"))
    share = 100 * tk["parameters"] / tt["parameters"]
    claim = (
        f"TK r=16 is within {abs(tk['mean'] - tt['mean']):.1f} points of TT r=16 with {share:.0f} % of its parameters"
    )
    save(figure, axes, claim, "accuracy_by_rank.png")


if __name__ == "__main__":
    draw_sizes()
    draw_accuracies()
