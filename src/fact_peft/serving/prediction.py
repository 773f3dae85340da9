"""What one adapter says of one image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """The answer of one adapter, or of the base model alone, to one image.

    Attributes:
        adapter: Name of the adapter; None for the base model.
        logits: (num_labels,), on the device of the model.
        labels: The class names in the order of the logits; None if nobody has named them.
    """

    adapter: str | None
    logits: Tensor
    labels: list[str] | None

    @property
    def scores(self) -> Tensor:
        """Probabilities (num_labels,) in float32."""
        return self.logits.float().softmax(-1)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes, or all if there are fewer, with their probabilities.

        A class without a name goes by its number.
        """
        scores, indices = self.scores.topk(min(k, len(self.logits)))
        names = [str(i) if self.labels is None else self.labels[i] for i in indices.tolist()]
        return list(zip(names, scores.tolist(), strict=True))
