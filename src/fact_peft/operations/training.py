"""How an adapter is trained: its factors at two learning rates, and with numbers rounded as they will be stored."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.config import fact_config
from ..adapter.storage import rounded, to_storage
from ..tuner.factors import FacTStack
from ..tuner.head import FacTHead
from ..tuner.lifecycle import own_stacks

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
    if not groups["shared"]["params"]:
        raise ValueError(
            f"{type(model).__name__} trains no factor of FacT; pass the adapted model, with an adapter that is active "
            "and not in inference mode."
        )
    return [group for group in groups.values() if group["params"]]


class StraightThrough:
    """Have an adapter hold its numbers as they will be stored, while an optimizer trains the exact ones.

    The gradient at the rounded numbers is taken for the gradient at the exact ones (straight-through estimator; Bengio,
    Leonard and Courville 2013, arXiv 1308.3432). Between steps, when the model is evaluated or saved, the adapter holds
    the rounded numbers. Numbers that are written between steps, as by loading a state dict or a hot-swap, are trained
    from there.

        StraightThrough(model, optimizer, "int4")  # in a loop of one's own, before the last epochs

    Args:
        model: A `PeftModel`, or a model with injected FacT layers; under DDP the module inside.
        optimizer: Of torch, or accelerate's around it.
        storage: As `FacTConfig.storage`, which is set to it.
        head_storage: As `FacTConfig.head_storage`, which is set to it.
        adapter_name: The adapter.

    Raises:
        ValueError: If there is no such adapter or storage, or its parameters are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        storage: str,
        head_storage: str | None = None,
        adapter_name: str = "default",
    ) -> None:
        config = fact_config(model, adapter_name)
        settled = replace(config, storage=storage, head_storage=head_storage)  # checks the two
        heads = [m for m in model.modules() if isinstance(m, FacTHead) and adapter_name in m.modules_to_save]
        self._storages: dict[Tensor, str | None] = {
            **{factor: storage for s in own_stacks(model, adapter_name) for factor in s.factors(adapter_name).values()},
            **{p: settled.storage_of_heads for head in heads for p in head.modules_to_save[adapter_name].parameters()},
        }
        if any(hasattr(parameter, "ds_shape") or hasattr(parameter, "placements") for parameter in self._storages):
            raise ValueError(
                "The parameters are spread over processes (FSDP or ZeRO-3), and rounding needs whole ones; train the "
                "last epochs with DDP or in one process."
            )
        config.storage, config.head_storage = storage, head_storage
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._exact = {parameter: parameter.detach().clone() for parameter in self._storages}
        self._rounded: dict[Tensor, Tensor] = {}
        self._round()
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def stop(self) -> None:
        """Train the rounded numbers as ordinary ones from now on."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for parameter, exact in self._exact.items():
            if torch.equal(parameter, self._rounded[parameter].to(parameter)):
                parameter.copy_(exact)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for parameter, exact in self._exact.items():
            exact.copy_(parameter)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, storage in self._storages.items():
            parameter.copy_(to_storage("parameter", parameter, storage, packing=rounded))
            self._rounded[parameter] = parameter.detach().clone()


class StraightThroughCallback(TrainerCallback):
    """`StraightThrough` for the last epochs of transformers' Trainer.

    Checkpoints from then on are stored in these data types. A run that is resumed from one starts from the rounded
    numbers.

    Args:
        storage: As `FacTConfig.storage`.
        head_storage: As `FacTConfig.head_storage`.
        epochs: The number of epochs, which need not be whole.
        adapter_name: The adapter.
    """

    def __init__(
        self, storage: str, head_storage: str | None = None, epochs: float = 2, adapter_name: str = "default"
    ) -> None:
        self.storage, self.head_storage = storage, head_storage
        self.epochs = epochs
        self.adapter_name = adapter_name
        self._rounding: StraightThrough | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start before the first step of the last epochs."""
        if self._rounding is None and (state.epoch or 0) >= state.num_train_epochs - self.epochs:
            self._rounding = StraightThrough(
                kwargs["model"], kwargs["optimizer"], self.storage, self.head_storage, self.adapter_name
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop rounding, and remove the hooks from the optimizer."""
        if self._rounding is not None:
            self._rounding.stop()
            self._rounding = None
