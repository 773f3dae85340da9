"""A trained adapter stored in few bits: its bytes on disk with head and config, and what rounding changed."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.frontier.bytes.forms import distance, orthogonalized
from benchmarks.frontier.search import is_head
from fact_peft import Adapter, FacTConfig, quantize_adapter
from fact_peft.adapter.storage import bits_of, pack, unpack
from fact_peft.method.decomposition import DECOMPOSITIONS
from fact_peft.operations.inspection import task_bytes
from fact_peft.tuner.lifecycle import own_stacks

AS_TRAINED, ORTHOGONALIZED = "as trained", "orthogonalized"


@torch.no_grad()
def store_fact(model: PeftModel, storage: str, head_storage: str, form: str) -> dict[str, Any]:
    """Round a FacT adapter in place as it is stored, its factors written in a form, and say what it takes.

    Returns:
        Bytes by part, and the change of all increments relative to their norm, in per cent.
    """
    config = model.peft_config["default"]
    decomposition, bits = DECOMPOSITIONS[config.decomposition], bits_of(storage)
    stacks = [stack.factors("default") for stack in own_stacks(model, "default")]
    exact = [{letter: factor.detach().double() for letter, factor in factors.items()} for factors in stacks]
    if bits:
        for factors, before in zip(stacks, exact, strict=True):
            written = orthogonalized(before) if form == ORTHOGONALIZED else before
            for letter, factor in factors.items():
                factor.copy_(unpack(pack(written[letter], bits)))
    quantize_adapter(model, storage, head_storage)
    zeros = [{**factors, "U": torch.zeros_like(factors["U"])} for factors in exact]
    changed = sum(
        distance(decomposition, before, {letter: factor.double() for letter, factor in factors.items()}) ** 2
        for factors, before in zip(stacks, exact, strict=True)
    )
    whole = sum(distance(decomposition, before, zero) ** 2 for before, zero in zip(exact, zeros, strict=True))
    return {**bytes_of_saved(model), "error": 100 * (changed / whole) ** 0.5}


def bytes_of_saved(model: PeftModel) -> dict[str, int]:
    """Bytes of a FacT adapter on disk, by part."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Adapter.of(model)
        adapter.write(folder)
        taken = task_bytes(adapter, Path(folder))
    return {"bytes": taken.total, **vars(taken)}


@torch.no_grad()
def store_other(model: nn.Module, heads: list[str], storage: str, head_storage: str) -> dict[str, Any]:
    """The same for another method, whose head and numbers are packed as FacT's are; vectors too."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        wanted = head_storage if is_head(name, heads) else storage
        bits = bits_of(wanted)
        stored = pack(parameter, bits) if bits else parameter.to("cpu", getattr(torch, wanted))
        parameter.copy_(unpack(stored) if bits else stored)
        saved[name.replace(".default", "").replace("modules_to_save.", "")] = stored  # as PEFT names them
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.peft_config["default"].save_pretrained(folder)
        save_file(saved, Path(folder, "adapter_model.safetensors"))
        return {"bytes": sum(file.stat().st_size for file in Path(folder).iterdir())}


def is_fact(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.peft_config["default"], FacTConfig)
