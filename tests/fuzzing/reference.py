"""What a network with FacT adapters must compute, in plain float64 matrices written from the paper's equations.

Nothing of the package is used: the reference keeps the numbers of each adapter, knows which are active or merged, and
runs the original network with other weights in it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.backbones import logits


def slice_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Squares of the shorter side where they tile the weight; else the weight itself."""
    short, long = min(in_features, out_features), max(in_features, out_features)
    return (short, short) if long % short == 0 else (in_features, out_features)


@dataclass
class Adapter:
    """The numbers of one adapter.

    Attributes:
        rank: Its rank r.
        decomposition: ``"tt"`` or ``"tk"``.
        scale: Its scale s.
        layers: (inputs, outputs) by name of its layers, in the order of the model.
        factors: Factors by stack and letter.
        head: Its own weights of the classifier, by the name they have in the network; empty if it has none.
    """

    rank: int
    decomposition: str
    scale: float
    layers: dict[str, tuple[int, int]]
    factors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[tuple[str, str] | str, Tensor]:
        return {**self.factors, **self.head}

    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Shapes of the factors: U d x r, V e x r, and Sigma N x r x r (eq. 8) or C r x r x r, P N x r (eq. 10)."""
        slices: Counter[tuple[int, int]] = Counter()
        for in_features, out_features in self.layers.values():
            d, e = slice_shape(in_features, out_features)
            slices[d, e] += in_features * out_features // (d * e)
        shapes = {}
        for (d, e), count in slices.items():
            r, stack = self.rank, f"{d}x{e}"
            shapes[stack, "U"], shapes[stack, "V"] = (d, r), (e, r)
            if self.decomposition == "tt":
                shapes[stack, "Sigma"] = (count, r, r)
            else:
                shapes[stack, "C"], shapes[stack, "P"] = (r, r, r), (count, r)
        return shapes

    def core(self, stack: str, k: int) -> Tensor:
        if self.decomposition == "tt":
            return self.factors[stack, "Sigma"][k]
        P, C = self.factors[stack, "P"], self.factors[stack, "C"]
        return sum((P[k, t] * C[t] for t in range(self.rank)), torch.zeros_like(C[0]))

    def increments(self) -> dict[str, Tensor]:
        """dW (inputs, outputs) by layer: its slices s U Sigma_k V^T, input block by input block."""
        taken: Counter[str] = Counter()
        increments = {}
        for name, (in_features, out_features) in self.layers.items():
            d, e = slice_shape(in_features, out_features)
            stack = f"{d}x{e}"
            rows = []
            for _ in range(in_features // d):
                row = []
                for _ in range(out_features // e):
                    core = self.core(stack, taken[stack])
                    row.append(self.scale * self.factors[stack, "U"] @ core @ self.factors[stack, "V"].T)
                    taken[stack] += 1
                rows.append(torch.cat(row, dim=1))
            increments[name] = torch.cat(rows, dim=0)
        return increments


class Reference:
    """The network, its adapters, and which of them have a part in the output.

    Attributes:
        base: Weights of the network by name, which nothing but a trained bias may change.
        adapters: All adapters by name.
        active: Names of those that are on.
        head: Whose classifier is used; None for the network's own.
        merged: Increments in the base weights by adapter and layer, as they were when merged.
        disabled: Whether all adapters are switched off.
        head_disabled: Whether all classifiers but the network's own are.
    """

    def __init__(self, plain: nn.Module) -> None:
        """
        Args:
            plain: The network before it is adapted, in float64. It is not changed.
        """
        self.plain = plain
        self.base = {name: value.detach() for name, value in plain.state_dict().items()}
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.head: str | None = None
        self.merged: dict[str, dict[str, Tensor]] = {}
        self.disabled = self.head_disabled = False

    def copy(self, adapter_name: str) -> Adapter:
        return copy.deepcopy(self.adapters[adapter_name])

    def activate(self, names: Iterable[str]) -> None:
        """Switch to these adapters; of their classifiers there is one at most."""
        self.active = list(names)
        heads = [name for name in self.active if self.adapters[name].head]
        self.head = heads[0] if heads else None

    def added(self) -> dict[str, Tensor]:
        """What is added to the weight of each layer. A layer with merged adapters computes with those alone."""
        if self.disabled:
            return {}
        merged: dict[str, Tensor] = {}
        for increments in self.merged.values():
            for layer, increment in increments.items():
                merged[layer] = merged.get(layer, 0) + increment
        total: dict[str, Tensor] = {}
        for name in self.active:
            for layer, increment in self.adapters[name].increments().items():
                if layer not in merged:
                    total[layer] = total.get(layer, 0) + increment
        return {**merged, **total}

    def logits(self, pixels: Tensor) -> Tensor:
        head = {} if self.head is None or self.head_disabled else self.adapters[self.head].head
        return self.run(pixels, self.added(), head)

    def logits_of(self, adapter_name: str | None, pixels: Tensor) -> Tensor:
        """With one adapter alone, or none."""
        if adapter_name is None:
            return self.run(pixels, {}, {})
        adapter = self.adapters[adapter_name]
        return self.run(pixels, adapter.increments(), adapter.head)

    def run(self, pixels: Tensor, added: dict[str, Tensor], head: dict[str, Tensor]) -> Tensor:
        weights = {f"{layer}.weight": self.base[f"{layer}.weight"] + dW.T for layer, dW in added.items()}
        network = _Logits(self.plain)
        replaced = {f"network.{name}": value for name, value in {**self.base, **weights, **head}.items()}
        return functional_call(network, replaced, (pixels.double(),))

    def gradients(self, pixels: Tensor, labels: Tensor) -> dict[tuple[str, tuple[str, str] | str], Tensor]:
        """Of the cross entropy, for every number of an active adapter that has a part in the output."""
        names = dict.fromkeys([*self.active, *([self.head] if self.head else [])])
        leaves = {}
        for name in names:
            adapter = self.adapters[name]
            for numbers in (adapter.factors, adapter.head):
                for key in numbers:
                    numbers[key] = numbers[key].detach().requires_grad_()
                    leaves[name, key] = numbers[key]
        loss = nn.functional.cross_entropy(self.logits(pixels), labels)
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:  # all may be merged
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name in names:
            adapter = self.adapters[name]
            for numbers in (adapter.factors, adapter.head):
                for key in numbers:
                    numbers[key] = numbers[key].detach()
        return {leaf: gradient for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return logits(self.network, pixels)
