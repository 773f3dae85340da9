"""From a checkpoint of another implementation of FacT to an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from .assembly import DonatedLayer, Share, assemble
from .authors import read_authors
from .checkpoint import read_checkpoint
from .ma_sam import read_ma_sam
from .micro_sam import read_micro_sam


@dataclass(frozen=True)
class Donor:
    """Another implementation of FacT.

    Attributes:
        read: Layers and heads of a checkpoint, which it takes out of the tensors that it is given.
        scale: The factor s that it always computes with; None if that is an argument of its runs.
        share: Who shares U and V there, as `FacTConfig.share`.
        state: Where its checkpoints have the tensors, unless they are all that there is.
    """

    read: Callable[[dict[str, Tensor]], tuple[dict[str, DonatedLayer], dict[str, Tensor]]]
    scale: float | None = None
    share: Share = "model"
    state: str = ""


FORMATS = {
    "authors": Donor(read_authors),
    "ma-sam": Donor(read_ma_sam),
    "micro-sam": Donor(read_micro_sam, scale=1.0, share="block", state="model_state"),
}
# What a training saves beside the state of its model to go on from there; a second model is not part of that.
STATES_OF_TRAINING = {"init", "optimizer_state", "scheduler_state", "scaler_state"}
NOTES = {"iteration", "epoch", "best_epoch", "best_metric", "current_metric", "train_time", "timestamp"}


def convert_from(
    donor: str, checkpoint: Mapping[str, Any], scale: float | None = None, leave_out: Iterable[str] = ()
) -> tuple[FacTConfig, dict[str, Tensor]]:
    """A checkpoint of another implementation of FacT as an adapter with the same increments, exactly.

    Args:
        donor: Whose: ``"authors"``, ``"ma-sam"`` or ``"micro-sam"``.
        checkpoint: Tensors by name, as the donor saves them.
        scale: The factor s of the run, which no checkpoint stores; not for ``"micro-sam"``, which has none.
        leave_out: Tensors that have one of these in their name are left out knowingly, such as ``".adapter_"``.

    Returns:
        The config, and the state dict as `set_peft_model_state_dict` takes it.

    Raises:
        ValueError: If the donor is unknown, the scale is missing or one too many, or the checkpoint has other tensors
            or shapes than the donor saves; those that an adapter cannot hold are named.
    """
    if donor not in FORMATS:
        raise ValueError(f"donor={donor!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}.")
    known = FORMATS[donor]
    if known.scale is not None and scale not in (None, known.scale):
        raise ValueError(f"scale={scale!r}, but {donor!r} always computes with {known.scale:g}; leave it out.")
    scale = known.scale if scale is None else scale
    if scale is None:
        raise ValueError(
            f"A checkpoint of {donor!r} does not say with which scale it was trained; pass scale=s, the argument of "
            "that run (for the authors' the value in configs/, for MA-SAM 1 by default)."
        )
    words = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    entries = dict(checkpoint)
    if known.state in entries:
        beside = entries.keys() - {known.state} - STATES_OF_TRAINING - NOTES
        entries = {**entries[known.state], **{name: entries[name] for name in sorted(beside)}}
    tensors = {name: tensor for name, tensor in entries.items() if not any(word in name for word in words)}
    layers, heads = known.read(tensors)
    if tensors:
        raise ValueError(
            f"These entries of the checkpoint have no place in a FacT adapter: {', '.join(tensors)}. Without them the "
            "model computes something else; leave_out drops them by a part of their names, if that is what you want."
        )
    return assemble(layers, scale, heads, known.share)


def convert_checkpoint(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    donor: str,
    scale: float | None = None,
    leave_out: Iterable[str] = (),
) -> FacTConfig:
    """`convert_from` a file to an adapter folder, which ``PeftModel.from_pretrained`` loads; returns its config.

    Raises:
        ValueError: As `convert_from`, or if the file is damaged or its pickle holds more than plain data. Nothing is
            written then.
    """
    config, state_dict = convert_from(donor, read_checkpoint(file), scale, leave_out)
    Adapter.from_state_dict(config, state_dict, str(file)).write(out)
    return config
