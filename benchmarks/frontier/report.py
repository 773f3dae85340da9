"""Tables of `benchmarks.frontier`, from its results alone: what was chosen on validation images, and its accuracy."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.frontier.search import SEARCH_SEED
from benchmarks.frontier.tasks import GROUPS
from benchmarks.reporting.markdown import table
from benchmarks.reporting.results import Results

Point = tuple[float, float]  # trainable parameters, accuracy
FACT, ORTHOGONAL, GRADIENTS, OTHERS = "FacT", "FacT, orthogonal", "FacT, gradients", "the others"
SIDES = (FACT, ORTHOGONAL, GRADIENTS, OTHERS)  # what is compared
MEAN = "mean"


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
    starts = {"orthogonal": ORTHOGONAL, "default scale": ORTHOGONAL, "gradients": GRADIENTS}
    return starts.get(method.partition(", ")[2], FACT)


def read(folder: Path) -> pd.DataFrame:
    """One row per run, with its task, which is the name of the file up to the first dot.

    Raises:
        ValueError: If there are none, or if they are of several backbones, image sizes, precisions or schedules.
    """
    frames = [Results(file).frame().assign(task=file.name.partition(".")[0]) for file in sorted(folder.glob("*.json"))]
    if not frames:
        raise ValueError(f"{folder} has no results; measure some first, with --data.")
    runs = pd.concat(frames, ignore_index=True)
    for condition in ("backbone", "image_size", "precision", "epochs", "batch_size"):
        if runs[condition].nunique() > 1:
            raise ValueError(
                f"The results in {folder} differ in {condition}: {set(runs[condition])}; keep one --output for each."
            )
    return runs


def trials(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs among which the search chose: of the first seed, where there are several rates."""
    first = runs[runs["seed"] == SEARCH_SEED]
    return first[first.groupby(["task", "method"])["learning_rate"].transform("nunique") > 1]


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """Of every task and method the runs, one per seed, with the learning rate that was best on validation images."""
    tried = trials(runs)
    best = tried.loc[tried.groupby(["task", "method"])["val_accuracy"].idxmax()]
    return runs.merge(best[["task", "method", "learning_rate"]])


def validation_means(runs: pd.DataFrame, choosing: list[str]) -> pd.Series:
    """Mean validation accuracy on the tasks `choosing` by method and learning rate, of those run on all of them."""
    tried = runs[(runs["seed"] == SEARCH_SEED) & runs["task"].isin(choosing)]
    found = tried.pivot_table(index=["method", "learning_rate"], columns="task", values="val_accuracy")
    return found.reindex(columns=choosing).dropna().mean(axis=1)


def best_rates(runs: pd.DataFrame, choosing: list[str]) -> dict[str, float]:
    """Of every method the learning rate with the best of `validation_means`."""
    means = validation_means(runs, choosing)
    return {} if means.empty else {method: rate for method, rate in means.groupby("method").idxmax()}


def at_best_rates(runs: pd.DataFrame, choosing: list[str]) -> pd.DataFrame:
    """The runs of every method at its `best_rates`."""
    return runs.merge(pd.DataFrame(best_rates(runs, choosing).items(), columns=["method", "learning_rate"]))


def fixed(runs: pd.DataFrame, choosing: list[str]) -> pd.DataFrame:
    """Of every method the runs at its `best_rates`, on the tasks that had no part in choosing it."""
    return at_best_rates(runs, choosing).loc[lambda kept: ~kept["task"].isin(choosing)]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the chosen runs by method and task: mean, std over seeds (nan of one) and sampling error.

    The sampling error is that of a proportion among so many test images.
    """
    points = runs.groupby(["task", "method"]).agg(
        parameters=("parameters", "first"),
        mean=("test_accuracy", "mean"),
        std=("test_accuracy", "std"),
        num_seeds=("seed", "nunique"),
        num_test=("sizes", lambda sizes: sizes.iloc[0][2]),
    )
    share = points["mean"] / 100
    points["sampling"] = 100 * np.sqrt(share * (1 - share) / points["num_test"])
    return points.reset_index()


def means(runs: pd.DataFrame, tasks: Iterable[str]) -> pd.DataFrame:
    """As `summary`, of the mean over `tasks`, for methods measured on all of them; std is of the seeds' means."""
    tasks = list(tasks)
    by_task = summary(runs[runs["task"].isin(tasks)])
    rows = []
    for method, group in by_task.groupby("method"):
        if len(group) == len(tasks):
            of_method = runs[(runs["method"] == method) & runs["task"].isin(tasks)]
            by_seed = of_method.pivot_table(index="seed", columns="task", values="test_accuracy").dropna().mean(axis=1)
            rows.append(
                {
                    "method": method,
                    "parameters": group["parameters"].mean(),
                    "mean": group["mean"].mean(),
                    "std": by_seed.std(),
                    "num_seeds": len(by_seed),
                    "sampling": np.sqrt((group["sampling"] ** 2).sum()) / len(group),
                }
            )
    return pd.DataFrame(rows, columns=["method", "parameters", "mean", "std", "num_seeds", "sampling"])


def panels(runs: pd.DataFrame, kinds: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """What `means` says of each group of tasks that is there, and of all tasks."""
    tasks = sorted(set(runs["task"]))
    of_group = {group: [task for task in tasks if kinds.get(task) == group] for group in GROUPS}
    return {name: means(runs, group) for name, group in {**of_group, MEAN: tasks}.items() if group}


def accuracy_table(runs: pd.DataFrame, kinds: Mapping[str, str]) -> str:
    """Test accuracy, mean and standard deviation over seeds, by method and task, smallest method first.

    Behind the tasks the means of the groups, the mean of these, and the mean of the tasks.
    """
    points = summary(runs)
    tasks = sorted(set(points["task"]), key=lambda task: (kinds.get(task, "~"), task))
    averages = {name: group.set_index("method")["mean"] for name, group in panels(runs, kinds).items()}
    groups = [name for name in GROUPS if name in averages]
    rows = []
    for method, group in sorted(points.groupby("method"), key=lambda item: item[1]["parameters"].iloc[0]):
        by_task = group.set_index("task")
        cells = [accuracy_cell(by_task.loc[task]) if task in by_task.index else "" for task in tasks]
        of_groups = [averages[name].get(method) for name in groups]
        cells += ["" if value is None else f"{value:.1f}" for value in of_groups]
        if len(groups) > 1:
            cells.append("" if None in of_groups else f"{np.mean(of_groups):.1f}")
        mean = averages[MEAN].get(method)
        rows.append([method, f"{group['parameters'].iloc[0]:,}", *cells, "" if mean is None else f"{mean:.1f}"])
    columns = [*groups, *(["mean of groups"] if len(groups) > 1 else []), MEAN]
    return table(["method", "parameters", *tasks, *columns], rows)


def accuracy_cell(point: pd.Series) -> str:
    spread = f" ± {point['std']:.1f}" if point["num_seeds"] > 1 else ""
    return f"{point['mean']:.1f}{spread}"


def budget_table(columns: Mapping[str, pd.DataFrame], ours: str) -> str:
    """Best of FacT minus best other method within the same number of parameters, at every size of FacT measured there.

    Args:
        columns: Points of all methods, by the title of their column.
        ours: Which of FacT, one of `SIDES`.
    """
    groups = [sides(points) for points in columns.values()]
    rows = []
    for budget in sorted({size for group in groups for size, _ in group[ours]}):
        cells = [budget_cell(group, ours, budget) for group in groups]
        if any(cells):
            rows.append([f"{budget:,.0f}", *cells])
    return table(["parameters, at most", *columns], rows)


def budget_cell(group: Mapping[str, list[Point]], ours: str, budget: float) -> str:
    """Empty where FacT has no point of this size, or the others none as small."""
    difference = best_within(group[ours], budget) - best_within(group[OTHERS], budget)
    return "" if np.isnan(difference) or budget not in dict(group[ours]) else f"{difference:+.1f}"


def sides(points: pd.DataFrame) -> dict[str, list[Point]]:
    """The points of each of `SIDES`."""
    rows = list(zip(points["method"], points["parameters"], points["mean"], strict=True))
    return {name: [(size, mean) for method, size, mean in rows if side(method) == name] for name in SIDES}


def budget_tables(columns: Mapping[str, pd.DataFrame]) -> list[str]:
    """`budget_table` of each start that was measured, with a line that says what it is."""
    paragraphs = []
    for ours in (FACT, ORTHOGONAL, GRADIENTS):
        if any(sides(points)[ours] for points in columns.values()):
            paragraphs += [
                f"Best of {ours} minus best other method of at most so many parameters, in points:",
                budget_table(columns, ours),
            ]
    return paragraphs


def rate_table(runs: pd.DataFrame) -> str:
    """The learning rate of each method, and the seconds of a run."""
    rows = [
        [
            method,
            ", ".join(f"{rate:.2g}" for rate in sorted(set(group["learning_rate"]))),
            f"{group['seconds'].mean():.0f}",
        ]
        for method, group in runs.groupby("method")
    ]
    return table(["method", "learning rate", "seconds a run"], rows)


def conditions(runs: pd.DataFrame) -> str:
    """How the runs were made, in a line."""
    first = runs.iloc[0]
    tried = trials(runs).groupby(["task", "method"])["learning_rate"].nunique()
    counts = " to ".join(f"{count:.0f}" for count in sorted({tried.min(), tried.max()}))
    return (
        f"{first['image_size']} px, {first['precision']}, {first['epochs']} epochs, batches of {first['batch_size']}. "
        f"Learning rates tried, with the first seed: {counts}. Seeds of the one chosen: {runs['seed'].nunique()}."
    )


def report(runs: pd.DataFrame, kinds: Mapping[str, str], choosing: list[str]) -> str:
    """All tables as Markdown; with `choosing`, those of the search are of these tasks alone."""
    searched, with_fixed = chosen(runs), fixed(runs, choosing)
    if choosing:
        searched = searched[searched["task"].isin(choosing)]
    paragraphs = [conditions(runs)]
    if len(searched):
        paragraphs += [
            "**Searched for each task.** Test accuracy in %, mean and, of several seeds, standard deviation:",
            accuracy_table(searched, kinds),
            *budget_tables(panels(searched, kinds)),
        ]
    if len(with_fixed):
        paragraphs += [
            f"**No search:** one learning rate a method, the best on the mean of the validation images of "
            f"{', '.join(choosing)}; test accuracy in % on the other tasks:",
            accuracy_table(with_fixed, kinds),
            *budget_tables(panels(with_fixed, kinds)),
            "The rate, and what a run took:",
            rate_table(with_fixed),
        ]
    return "\n\n".join(paragraphs)
