"""From a checkpoint of another implementation of FacT to an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..storage.adapter_file import write_adapter
from ..tuner.config import FacTConfig
from .assembly import DonatedLayer, assemble
from .authors import read_authors
from .checkpoint import read_checkpoint
from .ma_sam import read_ma_sam

DONORS: dict[str, Callable[[dict[str, Tensor]], tuple[dict[str, DonatedLayer], dict[str, Tensor]]]] = {
    "authors": read_authors,
    "ma-sam": read_ma_sam,
}


def convert_from(
    donor: str, checkpoint: Mapping[str, Any], scale: float | None = None, leave_out: Iterable[str] = ()
) -> tuple[FacTConfig, dict[str, Tensor]]:
    """A checkpoint of another implementation of FacT as an adapter with the same increments, exactly.

    Args:
        donor: Whose: ``"authors"`` or ``"ma-sam"``.
        checkpoint: Tensors by name, as the donor saves them.
        scale: The factor s of the run, which these donors do not store.
        leave_out: Tensors that have one of these in their name are left out knowingly, such as ``".adapter_"``.

    Returns:
        The config, and the state dict as `set_peft_model_state_dict` takes it.

    Raises:
        ValueError: If the donor is unknown, the scale is missing, or the checkpoint has other tensors or shapes than
            the donor saves; those that an adapter cannot hold are named.
    """
    if donor not in DONORS:
        raise ValueError(f"donor={donor!r} is unknown; choose one of {', '.join(map(repr, DONORS))}.")
    if scale is None:
        raise ValueError(
            f"A checkpoint of {donor!r} does not say with which scale it was trained; pass scale=s, the argument of "
            "that run (for the authors' the value in configs/, for MA-SAM 1 by default)."
        )
    words = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    tensors = {name: tensor for name, tensor in checkpoint.items() if not any(word in name for word in words)}
    layers, heads = DONORS[donor](tensors)
    if tensors:
        raise ValueError(
            f"These entries of the checkpoint have no place in a FacT adapter: {', '.join(tensors)}. Without them the "
            "model computes something else; leave_out drops them by a part of their names, if that is what you want."
        )
    return assemble(layers, scale, heads)


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
    write_adapter(out, config, state_dict)
    return config
