"""What the paper reports: rank and scale of every VTAB-1K task, accuracies, and how it averages them."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

PAPER = json.loads(Path(__file__).with_name("fact_paper_results.json").read_text())
GROUPS = ("natural", "specialized", "structured")
GROUP_MEAN, FLAT_MEAN = "group mean", "flat mean"
GRIDS = {decomposition: PAPER["recipe"][f"rank_grid_{decomposition}"] for decomposition in ("tt", "tk")}
SCALES = PAPER["recipe"]["scale_grid"]
SHOTS = PAPER["few_shot_top1_percent"]["shots"]


class Task(NamedTuple):
    group: str
    num_classes: int
    settings: dict[str, tuple[int, float]]  # decomposition -> rank and scale

    @classmethod
    def of(cls, entry: dict) -> "Task":
        settings = {name: (entry[name]["rank"], entry[name]["scale"]) for name in ("tt", "tk")}
        return cls(entry["group"], entry["num_classes"], settings)


TASKS = {entry["name"]: Task.of(entry) for entry in PAPER["tasks"]}


def with_means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Add to accuracies per task the mean of every complete group and, of all 19 tasks, both averages.

    `GROUP_MEAN` is the mean of the three group means, which the paper calls "Average"; `FLAT_MEAN` weighs tasks alike.
    """
    groups = {group: [name for name, task in TASKS.items() if task.group == group] for group in GROUPS}
    means = {
        group: fmean(accuracies[name] for name in names)
        for group, names in groups.items()
        if all(name in accuracies for name in names)
    }
    if len(means) == len(GROUPS):
        means |= {GROUP_MEAN: fmean(means.values()), FLAT_MEAN: fmean(accuracies[name] for name in TASKS)}
    return {**accuracies, **means}


def vit_accuracies(decomposition: str, rank: int | None) -> dict[str, float]:
    """Top-1 per cent of ViT-B/16 by task and mean; `rank` None for the rank per task. Empty where nothing is published.

    Table 1. The group mean is the published one: computed from the rounded figures it can be 0.1 off.
    """
    column = {("tt", None): "fact_tt_r16max", ("tt", 4): "fact_tt_r4", ("tk", None): "fact_tk_r32max"}
    column[("tk", 8)] = "fact_tk_r8"
    if (decomposition, rank) not in column:
        return {}
    results = PAPER["results"][column[decomposition, rank]]
    return {**with_means(results["top1_percent"]), GROUP_MEAN: results["group_mean_percent"]}


def swin_accuracies(decomposition: str, rank: int | None) -> dict[str, float]:
    """Top-1 per cent of Swin-B by group, Table 2; FacT-TT of rank 16 only."""
    if (decomposition, rank) != ("tt", 16):
        return {}
    _, average, *groups = PAPER["swin_b"]["fact_tt_r16"]
    return {**dict(zip(GROUPS, groups, strict=True)), GROUP_MEAN: average}


def few_shot_accuracy(dataset: str, shots: int, decomposition: str, rank: int) -> float | None:
    """Top-1 per cent of ViT-B/16, mean of three seeds, read off Figure 6; FacT-TT of rank 16 only."""
    if (decomposition, rank) != ("tt", 16) or shots not in SHOTS:
        return None
    return PAPER["few_shot_top1_percent"][dataset][SHOTS.index(shots)]
