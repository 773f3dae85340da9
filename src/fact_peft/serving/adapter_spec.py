"""What adapters that can be stacked into one tensor have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import slices_of, stack_sizes


class AdapterSpec:
    """Names and shapes of an adapter's numbers, which lie one behind the other in a vector.

    There is one object per spec, see `spec_of`, so that specs are equal only if they are the same.

    Attributes:
        slices: The slices of every adapted layer, by the layer's name.
        decomposition: Name of the decomposition.
        rank: Rank of the factors.
        heads: Shapes of the head's tensors by name.
    """

    def __init__(
        self,
        layout: tuple[str, ...],
        share: str,
        decomposition: str,
        rank: int,
        heads: tuple[tuple[str, tuple[int, ...]], ...],
    ) -> None:
        self.slices = slices_of(layout, share)
        self.decomposition = DECOMPOSITIONS[decomposition]
        self.rank = rank
        self.heads = dict(heads)

    @cached_property
    def factors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the factors under their paper letters, by stack."""
        widths = {owned.stack: (owned.in_width, owned.out_width) for owned in self.slices.values()}
        sizes = stack_sizes(self.slices.values())
        return {stack: self.decomposition.shapes(*widths[stack], sizes[stack], self.rank) for stack in widths}

    @cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Shapes of all tensors: of factors under (stack, letter), of the head under ("", name)."""
        shapes = {(stack, letter): shape for stack, group in self.factors.items() for letter, shape in group.items()}
        return shapes | {("", name): shape for name, shape in self.heads.items()}

    @cached_property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def join(self, tensors: Mapping[tuple[str, str], Tensor], dtype: torch.dtype) -> Tensor:
        """The tensors as one vector."""
        return torch.cat([tensors[key].detach().flatten().to("cpu", dtype) for key in self.shapes])

    def split(self, vectors: Tensor) -> dict[tuple[str, str], Tensor]:
        """The tensors (n, ...) in vectors (n, size), without copying."""
        parts = vectors.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {key: part.unflatten(-1, shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def terms(self, tensors: Mapping[tuple[str, str], Tensor], stack: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (n, d, r), all cores Sigma_k (n, N, r, r) and V (n, e, r) in one stack, of what `split` gives."""
        return self.decomposition.terms({letter: tensors[stack, letter] for letter in self.factors[stack]})


spec_of = lru_cache(maxsize=None)(AdapterSpec)
