"""Adapters in the manner of AdaptFormer (Chen et al., NeurIPS 2022): a narrow branch beside every MLP."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fact_peft.architecture.blocks import find_block_linears

SCALE = 0.1  # the authors'


class Bottleneck(nn.Module):
    """SCALE W_up relu(W_down x) beside an MLP, zero at first, from the MLP's input (after the norm) to its output.

    Args:
        first: The MLP's first linear layer.
        last: Its last one.
        width: Of the bottleneck.
    """

    def __init__(self, first: nn.Linear, last: nn.Linear, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(first.in_features, width, device=first.weight.device)
        self.up = nn.Linear(width, last.out_features, device=first.weight.device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self._branch: Tensor | None = None
        first.register_forward_pre_hook(self.read)
        last.register_forward_hook(self.add)

    def read(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._branch = SCALE * self.up(torch.relu(self.down(arguments[0])))

    def add(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        branch, self._branch = self._branch, None
        return output + branch


class Bottlenecks(nn.Module):
    """A model with a `Bottleneck` of that width beside the MLP of every block: what widens, and what narrows again."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        shapes = find_block_linears(model)
        firsts = [model.get_submodule(name) for name, (inputs, outputs) in shapes.items() if inputs < outputs]
        lasts = [model.get_submodule(name) for name, (inputs, outputs) in shapes.items() if inputs > outputs]
        self.bottlenecks = nn.ModuleList(
            Bottleneck(first, last, width) for first, last in zip(firsts, lasts, strict=True)
        )

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)
