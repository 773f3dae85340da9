"""Tables of the toy frontier: those of `benchmarks.frontier`, what variants of FacT gain, what one default loses."""

import numpy as np
import pandas as pd

from benchmarks.frontier.report import MEAN, accuracy_table, budget_tables, chosen, is_fact, means, summary, trials
from benchmarks.frontier.toy.methods import METHODS, REMEDIES
from benchmarks.reporting.markdown import table

NUM_DEFAULTS = 6  # rows of the table of defaults
VARIANTS = [method for method in (*METHODS, *REMEDIES) if is_fact(method) and "," in method]


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
    tried = trials(runs)
    tried = tried[tried["method"].map(is_fact)]
    tasks = sorted(set(tried["task"]))
    plain = tried[tried["method"].isin(METHODS)]
    searched = plain.loc[plain.groupby("task")["val_accuracy"].idxmax()].set_index("task")
    test = tried.pivot_table(index=["method", "learning_rate"], columns="task", values="test_accuracy").dropna()
    val = tried.pivot_table(index=["method", "learning_rate"], columns="task", values="val_accuracy").dropna()
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


def report(runs: pd.DataFrame) -> str:
    """All tables as Markdown."""
    searched = chosen(runs)
    points = summary(searched)
    compared = searched[searched["method"].isin(METHODS)]
    tasks = sorted(set(compared["task"]))
    of_compared = summary(compared)
    columns = {task: of_compared[of_compared["task"] == task] for task in tasks} | {MEAN: means(compared, tasks)}
    paragraphs = [
        "Test accuracy in %, mean and standard deviation over seeds:",
        accuracy_table(compared, kinds={}),
        *budget_tables(columns),
    ]
    if points["method"].isin(VARIANTS).any():
        paragraphs += ["Variants of FacT minus the plain method, in points:", remedy_table(points)]
    paragraphs += [
        "One setting for all tasks minus the best FacT of every task, both with the first seed, in points:",
        default_table(runs),
    ]
    return "\n\n".join(paragraphs)
