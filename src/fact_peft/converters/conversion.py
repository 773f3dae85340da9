"""From a checkpoint of another implementation of FacT to an adapter."""

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.field_checks import check_choice
from ..adapter.names import PREFIX, factor_key
from ..architecture.linears import part_names
from ..method.tensorization import Slices, describe_layout, tensorize
from .source_formats import FORMATS, SourceLayer

# What a trainer saves beside the model to resume. The state of a second model is not listed, so it is refused by name.
NOT_OF_THE_MODEL = {
    *("init", "optimizer_state", "scheduler_state", "scaler_state"),
    *("iteration", "epoch", "best_epoch", "best_metric", "current_metric", "train_time", "timestamp"),
}


def convert_checkpoint(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    source_format: str,
    scale: float | None = None,
    leave_out: Iterable[str] = (),
) -> FacTConfig:
    """Convert a file as `convert_from` does, and save the adapter for ``PeftModel.from_pretrained``.

    Arguments that are not listed are those of `convert_from`.

    Args:
        file: A ``torch.save`` or safetensors file. Code in a pickle is never run.
        folder: Folder of the adapter to write.

    Returns:
        The config of the adapter.

    Raises:
        ValueError: As `convert_from`, or if the file is damaged or holds more than plain data. Nothing is written then.
    """
    config, state_dict = convert_from(source_format, read_checkpoint(file), scale, leave_out)
    Adapter.from_state_dict(config, state_dict, str(file)).write(folder)
    return config


def convert_from(
    source_format: str, checkpoint: Mapping[str, Any], scale: float | None = None, leave_out: Iterable[str] = ()
) -> tuple[FacTConfig, dict[str, Tensor]]:
    """Convert a checkpoint of another implementation of FacT to an adapter with exactly the same increments.

    Args:
        source_format: Which implementation: ``"authors"``, ``"ma-sam"`` or ``"micro-sam"``.
        checkpoint: Tensors by name, as that implementation saves them.
        scale: The factor s of the run, which no checkpoint stores. Leave it out for ``"micro-sam"``, which has none.
        leave_out: Parts of names, such as ``".adapter_"``. Tensors whose name contains one are dropped.

    Returns:
        The config, and the state dict as `set_peft_model_state_dict` takes it.

    Raises:
        ValueError: If the format is unknown, the scale is missing or superfluous, or the checkpoint has other tensors
            or shapes than the implementation saves. Tensors that an adapter cannot hold are named.
    """
    check_choice("source_format", source_format, tuple(FORMATS))
    known = FORMATS[source_format]
    if known.scale is not None and scale not in (None, known.scale):
        raise ValueError(f"scale={scale!r}, but {source_format!r} always computes with {known.scale:g}; leave it out.")
    scale = known.scale if scale is None else scale
    if scale is None:
        raise ValueError(
            f"A checkpoint of {source_format!r} does not say with which scale it was trained; pass scale=s, the "
            "argument of that run (for the authors' the value in configs/, for MA-SAM 1 by default)."
        )
    words = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    entries = dict(checkpoint)
    if isinstance(entries.get(known.state), Mapping):
        entries = {**entries.pop(known.state), **{k: v for k, v in entries.items() if k not in NOT_OF_THE_MODEL}}
    tensors = {name: tensor for name, tensor in entries.items() if not any(word in str(name) for word in words)}
    if strays := [repr(name) for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"The checkpoint has keys that are no names: {', '.join(strays)}; pass tensors by name.")
    layers, heads = known.read(tensors)
    if tensors:
        raise ValueError(
            f"These entries of the checkpoint have no place in a FacT adapter: {', '.join(tensors)}. Without them the "
            "model computes something else; leave_out drops them by a part of their names, if that is what you want."
        )
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    parts = {name: layer.parts for name, layer in layers.items() if layer.parts}
    factors = join_factors(layers, tensorize(shapes, parts, known.share))
    # The targets are suffixes, so that a deeper model is noticed. If blocks have their own U and V, maybe only some are
    # adapted, and the targets are whole names.
    targets = {name: ".".join(name.split(".")[-2:]) if known.share == "model" else name for name in layers}
    config = FacTConfig(
        rank=next(iter(layers.values())).U.shape[1],
        scale=scale,
        init_weights=True,
        fact_dropout=0.1,  # as in all of them
        target_modules={part for name, layer in layers.items() for part in part_names(targets[name], layer.parts)},
        share=known.share,
        modules_to_save=sorted({name.partition(".")[0] for name in heads}),
        layout=describe_layout(shapes, parts),
        inference_mode=True,
    )
    return config, {f"{PREFIX}{name}": tensor for name, tensor in {**factors, **heads}.items()}


def join_factors(layers: Mapping[str, SourceLayer], slices: Mapping[str, Slices]) -> dict[str, Tensor]:
    """The factors of all stacks by their names in the adapted model, from layers in the order of the model."""
    rank = next(iter(layers.values())).U.shape[1]
    factors: dict[str, Tensor] = {}
    cores: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        owned = slices[name]
        expected = {"U": (owned.in_width, rank), "V": (owned.out_width, rank), "cores": (owned.count, rank, rank)}
        for letter, shape in expected.items():
            factor = getattr(layer, letter)
            if tuple(factor.shape) != shape:
                raise ValueError(f"{name} has {letter} of shape {tuple(factor.shape)}; {shape} is needed.")
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name} has NaN or infinity in {letter}: training probably diverged.")
        factors.update({factor_key(owned.stack, "U"): layer.U, factor_key(owned.stack, "V"): layer.V})
        cores.setdefault(owned.stack, []).append(layer.cores)
    return factors | {factor_key(stack, "Sigma"): torch.cat(parts) for stack, parts in cores.items()}


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a ``torch.save`` or safetensors file. Code in a pickle is never run."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"file={str(file)!r} does not exist; pass the checkpoint that the other code saved.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: it is damaged, or its pickle holds objects of other code, which "
            "is never run here. If you trust the file, load it in the code that made it and save its tensors by name, "
            'such as torch.save(checkpoint["model_state"], ...).'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a mapping from names to tensors is needed.")
    return content
