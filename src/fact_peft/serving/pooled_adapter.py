"""Adapters as the pool holds them: a description, which never changes, and one vector with all numbers."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..method.decomposition import DECOMPOSITIONS, Decomposition
from ..method.fused_linear import FactorBank, reordered
from ..method.tensorization import Slices, slices_of

Shape = tuple[int, ...]
Tensors = Mapping[str, Mapping[str, Tensor]]  # the factors by stack and paper letter, the head under "" by name


@dataclass(frozen=True, eq=False)
class AdapterSpec:
    """Names and shapes of an adapter's tensors. The vectors of adapters with the same spec can be stacked."""

    slices: Mapping[str, Slices]  # by layer name
    decomposition: Decomposition
    rank: int
    shapes: Mapping[str, Mapping[str, Shape]]  # in the order of the vector, under the keys of `Tensors`

    @cached_property
    def stacks(self) -> list[str]:
        return [stack for stack in self.shapes if stack]

    @property
    def heads(self) -> Mapping[str, Shape]:
        """Shapes of the head's tensors by name; empty if the adapter has no head."""
        return self.shapes.get("", {})

    def split(self, vectors: Tensor) -> Tensors:
        """The tensors (n, ...) in the vectors (n, size) of n adapters, as views."""
        sizes = [math.prod(shape) for shapes in self.shapes.values() for shape in shapes.values()]
        parts = iter(vectors.split(sizes, dim=-1))
        return {
            group: {name: next(parts).unflatten(-1, shape) for name, shape in shapes.items()}
            for group, shapes in self.shapes.items()
        }


@cache
def make_spec(
    layout: tuple[str, ...], share: str, decomposition: str, rank: int, shapes: tuple[tuple[str, str, Shape], ...]
) -> AdapterSpec:
    """The spec with these settings: the same object for the same settings, so that specs are compared by identity."""
    by_group: dict[str, dict[str, Shape]] = defaultdict(dict)
    for group, name, shape in shapes:
        by_group[group][name] = shape
    return AdapterSpec(slices_of(layout, share), DECOMPOSITIONS[decomposition], rank, dict(by_group))


def to_vector(adapter: Adapter, dtype: torch.dtype) -> tuple[AdapterSpec, Tensor]:
    """The spec of an adapter, and all its numbers as one vector in host memory."""
    config, tensors = adapter.config, {**adapter.factors, "": adapter.others}
    shapes = tuple(
        (group, name, tuple(tensor.shape))
        for group, named in sorted(tensors.items())
        for name, tensor in sorted(named.items())
    )
    spec = make_spec(tuple(config.layout or ()), config.share, config.decomposition, config.rank, shapes)
    return spec, torch.cat([tensors[group][name].detach().flatten().to("cpu", dtype) for group, name, _ in shapes])


@dataclass(frozen=True, eq=False)
class PooledAdapter:
    """What the pool knows of an adapter. The vector of its numbers is in an `AdapterCache`."""

    spec: AdapterSpec
    scale: float
    labels: list[str] | None  # None if they are not known
    num_labels: int  # the number of its logits

    def increment_norms(self, vector: Tensor) -> dict[str, float]:
        """Frobenius norm of dW, scale included, by layer name; `vector` has the adapter's numbers."""
        return self.spec.decomposition.norms(self.spec.split(vector), self.spec.slices, self.scale)


class StackedAdapters:
    """n adapters of one spec, with each of their tensors stacked along a first axis."""

    def __init__(self, spec: AdapterSpec, vectors: Mapping[PooledAdapter, Tensor], device: torch.device) -> None:
        numbers = torch.stack(list(vectors.values())).to(device)
        # The cores are sums of products of few numbers. In half precision they would lose what their storage has kept.
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        self.spec = spec
        self.tensors = spec.split(numbers)
        self.scales = torch.tensor([adapter.scale for adapter in vectors], dtype=numbers.dtype, device=device)

    def bank(self, stack: str, ours: Mapping[str, Slices]) -> FactorBank:
        """The factors in a stack, with a core for each of `ours`, the model's slices by layer."""
        if stack not in self.tensors:
            return FactorBank.empty(len(self.scales))
        U, cores, V = self.spec.decomposition.terms(self.tensors[stack])
        return FactorBank(U, reordered(cores * self.scales[:, None, None, None], self.spec.slices, ours), V)

    def head(self, name: str, frozen: Tensor) -> Tensor:
        """A tensor (n, ...) of the heads; n times that of the model, `frozen`, if the adapters have no head."""
        if name in self.spec.heads:
            return self.tensors[""][name]
        return frozen.expand(len(self.scales), *frozen.shape)
