"""A warning where the backbone of an adapted model is saved alone: the file has its layers and lacks their factors.

The factors belong to the adapted model. Before a state dict of that model is made, a hook tells its stacks. A layer
whose stack has not been told is part of another state dict, which lacks the factors. The warning is given only for a
part with all adapted layers, since accelerate asks single blocks for state dicts that are not saved.
"""

from __future__ import annotations

import warnings

from torch import nn

from ..adapter.names import FACTORS
from ..method.tensorization import Slices
from .factors import FacTStack, SharedFactors


def announce(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Tell the stacks of `model` that the state dict that begins will contain them; a hook of ``nn.Module``."""
    factors = getattr(model, FACTORS, None)
    if isinstance(factors, SharedFactors):
        for stack in factors.values():
            assert isinstance(stack, FacTStack)
            stack.announced = True


def warn_if_alone(adapter_name: str, slices: Slices, stack: FacTStack, prefix: str) -> None:
    """Warn at the last layer of an adapter if a state dict has all its layers and will not have its factors.

    `slices` are those of the layer that has just been added to the state dict, whose keys begin with `prefix`.
    """
    all_slices = stack.configs[adapter_name].slices
    names = [name.split(".") for name in all_slices]
    # From the innermost module with all layers to the last layer; the key of a layer in a smaller part is shorter.
    in_common = (depth for depth, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1)
    shortest = len(names[-1]) - next(in_common, len(names[-1]) - 1)
    is_last = slices == list(all_slices.values())[-1]
    if is_last and not stack.announced and prefix.count(".") >= shortest:
        warnings.warn(
            f"This state dict of a part of an adapted model lacks the factors of adapter {adapter_name!r}, which "
            "belong to the whole model. Save the whole model, or call merge_and_unload() before you save the part.",
            stacklevel=2,
        )
