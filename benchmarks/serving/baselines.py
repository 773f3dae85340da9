"""What the service is measured beside: the same service with something else in the pool's place.

Both have as much of `AdapterPool` as the service calls, and say the same of an image.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fact_peft import Prediction

NUM_KEPT = 32  # adapters that PEFT keeps loaded; one that is not takes the place of the one used longest ago


class Swapping:
    """PEFT alone, one active adapter at a time: a batch is as many passes as it has adapters.

    An adapter that is not among the last `NUM_KEPT` is loaded by PEFT from its folder, as a first request would. With
    one adapter in all, this is the plain model with that adapter active.
    """

    def __init__(self, vit: PreTrainedModel) -> None:
        self.vit = vit
        self.model: PeftModel | None = None
        self.folders: dict[str, str] = {}
        self.kept: OrderedDict[str, None] = OrderedDict()
        self.loads = 0

    def load(self, name: str, source: Path) -> None:
        self.folders[name] = str(source)

    def unload(self, name: str) -> None:
        del self.folders[name]

    def __contains__(self, name: str) -> bool:
        return name in self.folders

    def stats(self) -> dict:
        return {"resident": len(self.kept), "loads": self.loads}

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, adapters: list[str]) -> list[Prediction]:
        answers: dict[int, Prediction] = {}
        for name in dict.fromkeys(adapters):
            rows = [row for row, other in enumerate(adapters) if other == name]
            model = self.activate(name)
            for row, logits in zip(rows, model(pixel_values=pixel_values[rows]).logits, strict=True):
                answers[row] = Prediction(name, logits, None)
        return [answers[row] for row in range(len(adapters))]

    def activate(self, name: str) -> PeftModel:
        if name not in self.kept:
            self.loads += 1
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.vit, self.folders[name], name).eval()
            else:
                self.model.load_adapter(self.folders[name], name)
        self.kept[name] = None
        self.kept.move_to_end(name)
        self.model.set_adapter(name)
        if len(self.kept) > NUM_KEPT:
            self.model.delete_adapter(self.kept.popitem(last=False)[0])
        return self.model


def make_swapping(vit: PreTrainedModel, settings: object) -> Swapping:
    return Swapping(vit)
