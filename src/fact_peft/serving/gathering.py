"""From the adapter of every image to the factors and heads of a batch: adapters of one spec go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..method.fused_linear import FactorBank, joined, of_images, reordered
from ..tuner.mixed_batch import MixedBatch
from .adapter_spec import AdapterSpec
from .pooled_adapter import PooledAdapter
from .pooled_model import PooledModel

Owner = tuple[PooledAdapter, Tensor]  # an adapter and its numbers
# Adapters of one spec: their tensors (n, ...) by stack or "" and name, and their scales (n,).
Group = tuple[AdapterSpec, dict[tuple[str, str], Tensor], Tensor]


def gather(owners: Sequence[Owner | None], model: PooledModel, dtype: torch.dtype) -> MixedBatch:
    """The factors and heads of a batch.

    Ranks and numbers of labels are brought to the next power of two, so that a compiled model sees few shapes.

    Args:
        owners: The adapter of every image; None for the base model alone. At least one is not None.
        model: Where they will be used.
        dtype: In which to multiply.
    """
    by_spec: dict[AdapterSpec, dict[PooledAdapter, Tensor]] = {}
    for version, vector in filter(None, owners):
        by_spec.setdefault(version.spec, {})[version] = vector
    versions = [version for vectors in by_spec.values() for version in vectors]
    place_of = {version: place for place, version in enumerate([*versions, None])}
    places = [place_of[owner and owner[0]] for owner in owners]
    groups = list(stacked(by_spec, model.reference.device))
    with_base = len(versions) in places

    rank = next_power_of_two(max(spec.rank for spec in by_spec))
    banks = {}
    for stack in dict.fromkeys(stack for spec in by_spec for stack in spec.factors):
        parts = [bank_of(group, stack, model) for group in groups] + [FactorBank.empty(1)] * with_base
        bank = FactorBank.join(parts, model.num_slices[stack], rank)
        banks[stack] = bank.to(model.reference.device, dtype).of_images(places)

    heads = {}
    for name, base in model.heads.items():
        outputs = next_power_of_two(
            max(base.out_features, *(spec.heads.get(f"{name}.weight", (0,))[0] for spec in by_spec))
        )

        def of_all(kind: str, frozen: Tensor, *least: int, name: str = name) -> Tensor:
            ours = frozen.detach()[None]
            parts = [
                tensors.get(("", f"{name}.{kind}"), ours.expand(len(scales), *frozen.shape))
                for _, tensors, scales in groups
            ]
            return of_images(joined(parts + [ours] * with_base, *least).to(dtype), places)

        bias = None if base.bias is None else of_all("bias", base.bias, outputs)
        heads[name] = of_all("weight", base.weight, outputs, base.in_features), bias

    def bank_in(stack: str, device: torch.device, dtype: torch.dtype) -> FactorBank | None:
        return banks[stack].to(device, dtype) if stack in banks else None

    return MixedBatch(places, bank_in, heads=heads)


def stacked(by_spec: dict[AdapterSpec, dict[PooledAdapter, Tensor]], device: torch.device) -> Iterator[Group]:
    """The adapters of every spec in tensors."""
    for spec, vectors in by_spec.items():
        numbers = torch.stack(list(vectors.values())).to(device)
        # Sums of products of few numbers: in half precision they would lose what their storage has kept.
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        scales = torch.tensor([version.scale for version in vectors], dtype=numbers.dtype, device=device)
        yield spec, spec.split(numbers), scales


def bank_of(group: Group, stack: str, model: PooledModel) -> FactorBank:
    """The factors of a group in a stack, with cores in the order of the model's slices."""
    spec, tensors, scales = group
    if stack not in spec.factors:
        return FactorBank.empty(len(scales))
    U, cores, V = spec.terms(tensors, stack)
    cores = reordered(cores * scales[:, None, None, None], spec.slices, model.slices_of[stack])
    return FactorBank(U, cores, V)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
