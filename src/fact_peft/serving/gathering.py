"""From the adapter of every image to the factors and heads of a batch: adapters of one form go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..method.per_image import FactorBank, padded
from .form import Form
from .network import Network, PooledBatch
from .pooled_adapter import PooledAdapter

Owner = tuple[PooledAdapter, Tensor]  # an adapter and its numbers


def gather(owners: Sequence[Owner | None], network: Network, dtype: torch.dtype) -> PooledBatch:
    """The factors and heads of a batch.

    Ranks and numbers of labels are brought to the next power of two, so that a compiled network sees few shapes.

    Args:
        owners: The adapter of every image; None for the base model alone. At least one is not None.
        network: Where they will be used.
        dtype: In which to multiply.
    """
    groups = list(grouped(owners, network.reference.device))
    rank = bucket(max(form.rank for form, _, _, _ in groups))
    num_images = len(owners)

    def assemble(parts: Sequence[tuple[list[int], Tensor]], size: Sequence[int]) -> Tensor:
        """One tensor (images, *size) of parts, each with the images it is for."""
        if len(parts) == 1 and len(parts[0][0]) == num_images:
            return padded(parts[0][1], (num_images, *size)).to(dtype)
        whole = parts[0][1].new_zeros((num_images, *size), dtype=dtype)
        for images, part in parts:
            whole[images] = padded(part, (len(part), *size)).to(dtype)
        return whole

    factors = {}
    for stack in dict.fromkeys(stack for form, _, _, _ in groups for stack in form.factors):
        U, cores, V = [], [], []
        for form, images, tensors, scales in groups:
            if stack in form.factors:
                terms = form.terms(tensors, stack)
                U.append((images, terms[0]))
                cores.append((images, in_order_of(network, form, stack, terms[1] * scales[:, None, None, None])))
                V.append((images, terms[2]))
        sizes = (U[0][1].shape[1], rank), (network.num_slices[stack], rank, rank), (V[0][1].shape[1], rank)
        factors[stack] = FactorBank(*(assemble(part, size) for part, size in zip((U, cores, V), sizes, strict=True)))

    heads = {}
    for name, base in network.heads.items():
        outputs = bucket(
            max(base.out_features, *(form.heads.get(f"{name}.weight", (0,))[0] for form, _, _, _ in groups))
        )
        head: list[Tensor | None] = []
        for kind, frozen in (("weight", base.weight), ("bias", base.bias)):
            key = f"{name}.{kind}"
            parts = [(images, tensors["", key]) for form, images, tensors, _ in groups if key in form.heads]
            given = [image for form, images, _, _ in groups if key in form.heads for image in images]
            others = sorted(set(range(num_images)) - set(given))
            if others and frozen is not None:
                parts.append((others, frozen.detach().expand(len(others), *frozen.shape)))
            head.append(None if frozen is None else assemble(parts, (outputs, *frozen.shape[1:])))
        assert head[0] is not None
        heads[name] = head[0], head[1]
    return PooledBatch(num_images, factors, heads)


def grouped(
    owners: Sequence[Owner | None], device: torch.device
) -> Iterator[tuple[Form, list[int], dict[tuple[str, str], Tensor], Tensor]]:
    """For each form among the adapters of a batch: the images it has, their tensors and their scales."""
    images_of: dict[Form, list[int]] = {}
    for image, owner in enumerate(owners):
        if owner is not None:
            images_of.setdefault(owner[0].form, []).append(image)
    for form, images in images_of.items():
        mine = [owner for owner in owners if owner is not None and owner[0].form is form]
        distinct = list({version: vector for version, vector in mine}.items())
        vectors = torch.stack([vector for _, vector in distinct]).to(device)
        # Sums of products of few numbers: in half precision they would lose what their storage has kept.
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        scales = torch.tensor([version.scale for version, _ in distinct], dtype=vectors.dtype, device=device)
        if len(distinct) < len(mine):
            places = {version: place for place, (version, _) in enumerate(distinct)}
            index = torch.tensor([places[version] for version, _ in mine], device=device)
            vectors, scales = vectors[index], scales[index]
        yield form, images, form.split(vectors), scales


def in_order_of(network: Network, form: Form, stack: str, cores: Tensor) -> Tensor:
    """Cores (n, N, r, r) in the order of the network's slices; zeros where an adapter has none."""
    slices = [*network.slices.items(), *network.slices_by_block.items()]
    ours = {layer: owned for layer, owned in slices if owned.stack == stack}
    absent = cores.shape[1]
    order = []
    for layer, owned in ours.items():
        theirs = form.slices.get(layer)
        places = [None] * owned.count if theirs is None else theirs.places
        order += [absent if place is None else place for place in places]
    if order[:absent] == list(range(absent)):  # the usual case: all layers of the blocks, which come first
        return cores
    with_absent = torch.nn.functional.pad(cores, (0, 0, 0, 0, 0, 1))
    return with_absent[:, torch.tensor(order, device=cores.device)]


def bucket(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
