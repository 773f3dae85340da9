"""An adapter in few bits: rounded in place, and trained with rounded numbers so that it learns to live with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.adapter import Adapter
from ..adapter.config import fact_config
from ..adapter.packing import rounded
from ..adapter.storage import to_storage
from ..tuner.factors import FacTStack
from ..tuner.head import FacTHead


@torch.no_grad()
def quantize_adapter(
    model: nn.Module, storage: str | None, head_storage: str | None = None, adapter_name: str = "default"
) -> None:
    """Round an adapter in place to what is saved in a storage, and have it be saved so.

    A metric that is measured afterwards is that of the saved file, wherever it is loaded.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        storage: As `FacTConfig.storage`.
        head_storage: As `FacTConfig.head_storage`.
        adapter_name: The adapter to round.

    Raises:
        ValueError: If there is no such adapter or storage, the adapter is merged, or a number does not fit. The adapter
            is then as it was.
    """
    config = fact_config(model, adapter_name)
    adapter = Adapter.of(model, adapter_name).replace(storage=storage, head_storage=head_storage)
    Adapter.from_state_dict(adapter.config, adapter.stored()).fill(model, adapter_name)
    config.storage, config.head_storage = storage, head_storage


class StraightThrough:
    """From now on the adapter holds numbers as they will be stored, and an optimizer trains the exact ones behind them.

    The gradient at the rounded numbers is taken for that at the exact ones (straight-through estimator; Bengio, Leonard
    and Courville 2013, arXiv 1308.3432). Between steps, so also when the model is evaluated or saved, it holds the
    rounded numbers. What somebody else writes then, as loading a state dict or a hot-swap does, is trained on as it is.

        StraightThrough(model, optimizer, "int4")  # in a loop of one's own, before the last epochs

    Args:
        model: A `PeftModel`, or a model with injected FacT layers; under DDP the module inside.
        optimizer: Of torch, or accelerate's around it.
        storage: As `FacTConfig.storage`, where it is noted.
        head_storage: As `FacTConfig.head_storage`.
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
        settled = replace(config, storage=storage, head_storage=head_storage)  # for its checks
        stacks = [stack.factors(adapter_name) for stack in stacks_of(model, adapter_name)]
        self._storages: dict[Tensor, str | None] = {
            **{parameter: storage for factors in stacks for parameter in factors.values()},
            **{parameter: settled.storage_of_heads for parameter in head_parameters(model, adapter_name)},
        }
        if any(hasattr(parameter, "ds_shape") or hasattr(parameter, "placements") for parameter in self._storages):
            raise ValueError(
                "The parameters are spread over processes (FSDP or ZeRO-3), and rounding needs whole ones; train the "
                "last epochs with DDP or in one process."
            )
        config.storage, config.head_storage = storage, head_storage
        optimizer = getattr(optimizer, "optimizer", optimizer)
        with torch.no_grad():
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

    def _round(self) -> None:
        for parameter, storage in self._storages.items():
            parameter.copy_(to_storage("parameter", parameter, storage, packing=rounded))
            self._rounded[parameter] = parameter.detach().clone()


def stacks_of(model: nn.Module, adapter_name: str) -> list[FacTStack]:
    """The stacks that an adapter has factors in."""
    return [m for m in model.modules() if isinstance(m, FacTStack) and adapter_name in m.fact_U]


def head_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of an adapter's heads."""
    heads = [m for m in model.modules() if isinstance(m, FacTHead) and adapter_name in m.modules_to_save]
    return [parameter for head in heads for parameter in head.modules_to_save[adapter_name].parameters()]


class StraightThroughCallback(TrainerCallback):
    """`StraightThrough` for the last epochs of transformers' Trainer.

    Checkpoints from then on are stored in these bits. A run that goes on from one begins at the rounded numbers.

    Args:
        storage: As `FacTConfig.storage`.
        head_storage: As `FacTConfig.head_storage`.
        epochs: How many, also parts of one.
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
        """Let go of the optimizer."""
        if self._rounding is not None:
            self._rounding.stop()
            self._rounding = None
