"""What an optimizer trains: the factors at two learning rates, and the rest."""

import math
from typing import Any

from torch import nn

from ..tuner.factors import FacTStack

SHARED = ("fact_U", "fact_V")


def parameter_groups(
    model: nn.Module, lr: float, *, shared_lr_ratio: float | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """What an adapted model trains, for an optimizer: ``torch.optim.AdamW(parameter_groups(model, 4e-3))``.

    One step of U and V, which all slices share, moves every increment, and a step of a core moves one. So cores may
    have a higher learning rate: from the authors' start four times that of U and V (benchmarks/frontier). The default
    scale of the orthogonal start has the same effect.

    Args:
        model: An adapted model, or one in which FacT was injected; before or after it was wrapped for several GPUs by
            anything that keeps its parameters.
        lr: Learning rate of the cores.
        shared_lr_ratio: Learning rate of U and V, in units of `lr`. None: 1 from the orthogonal start, which is the
            default, else 0.25.
        head_lr: Learning rate of all else that is trained, such as the classifier; None: `lr`.

    Returns:
        Groups with the keys ``params``, ``lr`` and ``name`` (``"shared"``, ``"cores"``, ``"rest"``); none is empty.

    Raises:
        ValueError: If a rate or the ratio is not positive and finite, or if the model trains no factor.
    """
    stacks = [module for module in model.modules() if isinstance(module, FacTStack)]
    if shared_lr_ratio is None:
        trained = [(stack, name) for stack in stacks for name, U in stack.fact_U.items() if U.requires_grad]
        is_orthogonal = any(stack.configs[name].init_weights == "orthogonal" for stack, name in trained)
        shared_lr_ratio = 1.0 if is_orthogonal else 0.25
    rest_lr = lr if head_lr is None else head_lr
    for name, value in (("lr", lr), ("shared_lr_ratio", shared_lr_ratio), ("head_lr", rest_lr)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} is not a positive number; pass one such as lr=4e-3.")
    kinds = {
        id(factor): "shared" if kind in SHARED else "cores"
        for stack in stacks
        for kind in stack.adapter_layer_names
        for factor in getattr(stack, kind).values()
    }
    rates = {"shared": lr * shared_lr_ratio, "cores": lr, "rest": rest_lr}
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "lr": rate, "name": name} for name, rate in rates.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "rest")]["params"].append(parameter)
    if not groups["shared"]["params"] and not groups["cores"]["params"]:
        raise ValueError(
            f"{type(model).__name__} trains no factor of FacT; pass the adapted model, with an adapter that is active "
            "and not in inference mode."
        )
    return [group for group in groups.values() if group["params"]]
