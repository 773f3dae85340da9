"""Loss and metrics of an image classifier, with a report per class and plots."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    average_precision_score,
    classification_report,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer


class ImageTrainer(Trainer):
    """Weighted cross-entropy, also for mixed labels; binary cross-entropy if an image may have several labels."""

    class_weights: Tensor | None = None
    loss_is_scaled_for_ga = False  # the loss is the mean over the batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits.float()
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if self.model.config.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
        else:
            smoothing = self.args.label_smoothing_factor if model.training else 0.0
            loss = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss


def scores_of(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1; for several labels, mean average precision over the classes that occur, and macro F1."""
    predicted, labels = prediction.predictions, prediction.label_ids
    if labels.ndim == 1:
        macro_f1 = f1_score(labels, predicted, average="macro", zero_division=0)
        return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(macro_f1)}
    occurs = labels.any(0)
    macro_f1 = f1_score(labels, predicted > 0, average="macro", zero_division=0)
    mean_precision = average_precision_score(labels[:, occurs], predicted[:, occurs], average="macro")
    return {"mAP": float(mean_precision), "macro_f1": float(macro_f1)}


def write_reports(folder: Path, prediction: EvalPrediction, names: list[str], history: list[dict[str, Any]]) -> None:
    """Write report.txt, confusion.csv and picture.png.

    Args:
        folder: Where to write.
        prediction: Predicted classes, or logits if an image may have several labels, and the true labels.
        names: Names of the classes.
        history: The log of the Trainer.
    """
    predicted, labels = prediction.predictions, prediction.label_ids
    figure = Figure(figsize=(15, 5), layout="constrained")
    losses, scores, matrix = figure.subplots(1, 3)
    for axes, key, name in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        *((scores, f"eval_{name}", name) for name in scores_of(prediction)),
    ):
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
            axes.legend()
    losses.set(xlabel="epoch", title="loss")
    scores.set(xlabel="epoch", title="validation")
    classes = range(len(names))
    if labels.ndim == 1:
        confusion = confusion_matrix(labels, predicted, labels=classes)
        shown = ConfusionMatrixDisplay(confusion, display_labels=names)
        few = len(names) <= 20
        shown.plot(ax=matrix, include_values=few, colorbar=False, xticks_rotation="vertical", cmap="Blues")
        matrix.set(**({} if few else {"xticks": [], "yticks": []}))
        table = pd.DataFrame(confusion, pd.Index(names, name="true class"), names)
    else:
        predicted = predicted > 0
        confusion = multilabel_confusion_matrix(labels, predicted).reshape(-1, 4)
        table = pd.DataFrame(
            confusion,
            pd.Index(names, name="label"),
            ["true negative", "false positive", "false negative", "true positive"],
        )
        matrix.barh(names, f1_score(labels, predicted, average=None, zero_division=0))
        matrix.set(title="F1")
    table.to_csv(folder / "confusion.csv")
    occur = sorted({*labels, *predicted}) if labels.ndim == 1 else classes  # the classes of macro_f1
    named = [names[index] for index in occur]
    report = classification_report(labels, predicted, labels=occur, target_names=named, digits=3, zero_division=0)
    (folder / "report.txt").write_text(report, encoding="utf-8")
    figure.savefig(folder / "picture.png", dpi=120)


def percent(metric: str, value: float) -> str:
    """A metric as text: in per cent, except for a loss."""
    return f"{value:.4f}" if metric.endswith("loss") else f"{100 * value:.1f} %"
