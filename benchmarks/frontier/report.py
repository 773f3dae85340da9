"""Tables and plot of `benchmarks.frontier`, from its results alone."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.frontier.methods import METHODS, REMEDIES
from benchmarks.reporting.markdown import table
from benchmarks.reporting.results import Results

Point = tuple[float, float]  # trainable parameters, accuracy
NUM_DEFAULTS = 6  # rows of the table of defaults
FACT, ORTHOGONAL, OTHERS = "FacT", "FacT, orthogonal", "the others"
SIDES = {FACT: "black", ORTHOGONAL: "tab:blue", OTHERS: "tab:red"}  # what is compared, and in which colour


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that are better than every point of no more parameters, by parameters."""
    best: list[Point] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best


def best_within(points: Iterable[Point], budget: float) -> float:
    """The best accuracy that so many parameters reach; nan if nothing is that small."""
    return max((accuracy for size, accuracy in points if size <= budget), default=float("nan"))


def is_fact(method: str) -> bool:
    return method.startswith("FacT")


def side(method: str) -> str:
    """Which of `SIDES` a method is of."""
    if not is_fact(method):
        return OTHERS
    return ORTHOGONAL if method.endswith(", orthogonal") else FACT


VARIANTS = [method for method in (*METHODS, *REMEDIES) if is_fact(method) and "," in method]


def read(files: Iterable[Path]) -> pd.DataFrame:
    """One row per run, with its task, which is the name of the file up to the first hyphen."""
    frames = [Results(file).frame().assign(task=file.stem.partition("-")[0]) for file in files]
    runs = pd.concat(frames, ignore_index=True)
    if runs["backbone"].nunique() > 1:
        raise ValueError(f"The results are of several backbones, {set(runs['backbone'])}; keep one --output for each.")
    return runs


def first_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs in which the learning rate was searched."""
    return runs[runs["seed"] == runs["seeds"].str[0]]


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """Of every task and method the runs, one per seed, with the learning rate that was best on validation images."""
    trials = first_seed(runs)
    best = trials.loc[trials.groupby(["task", "method"])["val_accuracy"].idxmax()]
    return runs.merge(best[["task", "method", "learning_rate"]])


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the chosen runs by method and task, mean and std over seeds, where all seeds were run."""
    points = (
        chosen(runs)
        .groupby(["task", "method"])
        .agg(
            parameters=("parameters", "first"),
            mean=("test_accuracy", "mean"),
            std=("test_accuracy", "std"),
            num_seeds=("seed", "nunique"),
            num_planned=("seeds", lambda seeds: len(seeds.iloc[0])),
        )
    )
    return points[points["num_seeds"] == points["num_planned"]].reset_index()


def complete(points: pd.DataFrame) -> pd.DataFrame:
    """The mean over tasks of the methods that were measured on all tasks."""
    by_method = points.groupby("method").agg(
        parameters=("parameters", "mean"), mean=("mean", "mean"), num_tasks=("task", "nunique")
    )
    return by_method[by_method["num_tasks"] == points["task"].nunique()].reset_index()


def accuracy_table(points: pd.DataFrame) -> str:
    """Test accuracy, mean and standard deviation over seeds, by method and task, smallest method first."""
    tasks, means = sorted(set(points["task"])), complete(points).set_index("method")["mean"]
    rows = []
    for method, group in sorted(points.groupby("method"), key=lambda item: item[1]["parameters"].iloc[0]):
        by_task = group.set_index("task")
        cells = [
            f"{by_task.loc[task, 'mean']:.1f} ± {by_task.loc[task, 'std']:.1f}" if task in by_task.index else ""
            for task in tasks
        ]
        mean = f"{means[method]:.1f}" if method in means else ""
        rows.append([method, f"{group['parameters'].iloc[0]:,}", *cells, mean])
    return table(["method", "parameters", *tasks, "mean"], rows)


def budget_table(points: pd.DataFrame, ours: str) -> str:
    """Best of FacT minus best other method within the same number of parameters, at every size of FacT measured there.

    Args:
        points: Of all methods.
        ours: Which of FacT, one of `SIDES`.
    """
    tasks = sorted(set(points["task"]))
    groups = [sides(group) for group in (*(points[points["task"] == task] for task in tasks), complete(points))]
    rows = []
    for budget in sorted({size for group in groups for size, _ in group[ours]}):
        cells = [
            f"{best_within(group[ours], budget) - best_within(group[OTHERS], budget):+.1f}"
            if budget in dict(group[ours])
            else ""
            for group in groups
        ]
        rows.append([f"{budget:,.0f}", *cells])
    return table(["parameters, at most", *tasks, "mean"], rows)


def sides(group: pd.DataFrame) -> dict[str, list[Point]]:
    """The points of each of `SIDES`."""
    points = list(zip(group["method"], group["parameters"], group["mean"], strict=True))
    return {name: [(size, mean) for method, size, mean in points if side(method) == name] for name in SIDES}


def remedy_table(points: pd.DataFrame) -> str:
    """Test accuracy of every variant minus that of the plain method it varies, each at its best learning rate."""
    tasks = sorted(set(points["task"]))
    means = points.set_index(["method", "task"])["mean"]
    rows = []
    for remedy in VARIANTS:
        plain = remedy.partition(",")[0]
        differences = {
            task: means[remedy, task] - means[plain, task]
            for task in tasks
            if (remedy, task) in means and (plain, task) in means
        }
        if differences:
            cells = [f"{differences[task]:+.1f}" if task in differences else "" for task in tasks]
            rows.append([remedy, *cells, f"{np.mean(list(differences.values())):+.1f}"])
    return table(["variant", *tasks, "mean"], rows)


def default_table(runs: pd.DataFrame) -> str:
    """What one setting for all tasks loses against the best FacT of every task, searched on validation images.

    Of the settings measured on all tasks, those with the best mean validation accuracy. One seed, since the losing
    trials have but one.
    """
    trials = first_seed(runs)
    trials = trials[trials["method"].map(is_fact)]
    tasks = sorted(set(trials["task"]))
    plain = trials[trials["method"].isin(METHODS)]
    searched = plain.loc[plain.groupby("task")["val_accuracy"].idxmax()].set_index("task")
    test = trials.pivot_table(index=["method", "learning_rate"], columns="task", values="test_accuracy").dropna()
    val = trials.pivot_table(index=["method", "learning_rate"], columns="task", values="val_accuracy").dropna()
    best = val.mean(axis=1).sort_values(ascending=False).index[:NUM_DEFAULTS]
    rows = [
        [
            f"{method}, rate {rate:.2g}",
            *(f"{test.loc[(method, rate), task] - searched.loc[task, 'test_accuracy']:+.1f}" for task in tasks),
            f"{(test.loc[(method, rate)] - searched['test_accuracy']).mean():+.1f}",
        ]
        for method, rate in best
    ]
    winners = [f"{searched.loc[task, 'test_accuracy']:.1f} ({searched.loc[task, 'method']})" for task in tasks]
    rows.insert(0, ["searched per task", *winners, f"{searched['test_accuracy'].mean():.1f}"])
    return table(["setting", *tasks, "mean"], rows)


def plot(points: pd.DataFrame, file: Path) -> None:
    """Accuracy against trainable parameters, a panel per task and one for the mean over tasks."""
    matplotlib.use("Agg")
    points = points[points["method"].isin(METHODS)]
    panels = {task: points[points["task"] == task] for task in sorted(set(points["task"]))}
    panels["mean over tasks"] = complete(points).assign(std=0.0)
    colours = dict(zip(dict.fromkeys(m.family for m in METHODS.values()), plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(13, 4 * -(-len(panels) // 3)), squeeze=False)
    for axis, (title, group) in zip(axes.flat, panels.items(), strict=False):
        probe = group[group["parameters"] == 0]
        for _, row in probe.iterrows():
            axis.axhline(row["mean"], color="grey", linestyle=":", linewidth=1, label="linear probe")
        group = group[group["parameters"] > 0]
        for method, row in group.set_index("method").iterrows():
            family = METHODS[method].family
            style = {"marker": "o" if is_fact(method) else "s", "markersize": 6 if is_fact(method) else 5}
            axis.errorbar(
                row["parameters"], row["mean"], row["std"], color=colours[family], label=family, capsize=2, **style
            )
        for name, points_of_side in sides(group).items():
            if points_of_side:
                sizes, accuracies = zip(*frontier(points_of_side), strict=True)
                axis.step(
                    [*sizes, group["parameters"].max()], [*accuracies, accuracies[-1]], where="post", color=SIDES[name],
                    linewidth=1, linestyle="--" if name == OTHERS else "-", label=f"frontier of {name}",
                )  # fmt: skip
        axis.set(xscale="log", title=title, xlabel="trainable parameters without head", ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    entries = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(file, dpi=80)
    plt.close(figure)


def report(runs: pd.DataFrame) -> str:
    """All tables as Markdown."""
    points = summary(runs)
    compared = points[points["method"].isin(METHODS)]
    paragraphs = [
        "Test accuracy in %, mean and standard deviation over seeds:",
        accuracy_table(compared),
    ]
    for ours in (FACT, ORTHOGONAL):
        if compared["method"].map(side).eq(ours).any():
            paragraphs += [
                f"Best of {ours} minus best other method of at most so many parameters, in points:",
                budget_table(compared, ours),
            ]
    if points["method"].isin(VARIANTS).any():
        paragraphs += ["Variants of FacT minus the plain method, in points:", remedy_table(points)]
    paragraphs += [
        "One setting for all tasks minus the best FacT of every task, both with the first seed, in points:",
        default_table(runs),
    ]
    return "\n\n".join(paragraphs)
