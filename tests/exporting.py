"""Exports of a model, run on batches: torch.export, ONNX under onnxruntime, torch.jit.trace."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from peft import get_peft_model
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from fact_peft import FacTConfig

Batch = tuple[Tensor, ...]
Run = Callable[[Batch], Sequence[Tensor]]


class Floats(nn.Module):
    """A model called with its inputs in order, whose output is the tuple of its tensors of floats."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = tree_leaves(self.model(**dict(zip(self.names, inputs, strict=True))))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def open_axes(batch: Batch, any_size: bool) -> dict[str, Any]:
    """With `any_size`, the first axis of every input may have any length."""
    return {"inputs": tuple({0: Dim.DYNAMIC} if any_size else None for _ in batch)}


def by_export(model: nn.Module, batch: Batch, any_size: bool, strict: bool = False) -> Run:
    module = torch.export.export(model, batch, dynamic_shapes=open_axes(batch, any_size), strict=strict).module()
    return lambda inputs: module(*inputs)


def by_onnx(model: nn.Module, batch: Batch, any_size: bool) -> Run:
    import onnxruntime

    program = torch.onnx.export(model, batch, dynamo=True, dynamic_shapes=open_axes(batch, any_size), verbose=False)
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder, "model.onnx"))
        session = onnxruntime.InferenceSession(Path(folder, "model.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: [
        torch.from_numpy(array)
        for array in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    ]


def by_trace(model: nn.Module, batch: Batch, any_size: bool) -> Run:
    traced = torch.jit.trace(model, batch, check_trace=False)
    return lambda inputs: traced(*inputs)


WAYS: dict[str, Callable[[nn.Module, Batch, bool], Run]] = {
    "export": by_export,
    "strict export": partial(by_export, strict=True),
    "ONNX": by_onnx,
    "trace": by_trace,
}


def adapt(model: nn.Module) -> nn.Module:
    """With an adapter that changes the output."""
    torch.manual_seed(1)
    return get_peft_model(model, FacTConfig(rank=4, init_weights=False)).eval()


def two_batches(inputs: dict[str, Tensor]) -> tuple[Batch, Batch]:
    """The inputs, and one image more."""
    batch = tuple(inputs.values())
    return batch, tuple(torch.cat([x, x[:1].flip(-1)]) for x in batch)


@dataclass(frozen=True)
class Case:
    """An architecture's tiny model with an adapter, and without.

    Attributes:
        plain: Without.
        adapted: With.
        batch: Inputs of both.
        larger: The same, and one image more.
        effect: The largest difference that the adapter makes to an output.
    """

    plain: Floats
    adapted: Floats
    batch: Batch
    larger: Batch
    effect: float

    @classmethod
    @torch.no_grad()
    def of(cls, architecture: Architecture) -> Case:
        torch.manual_seed(0)
        model = architecture.build()
        inputs = architecture.inputs()
        batch, larger = two_batches(inputs)
        plain, adapted = (Floats(each, list(inputs)).eval() for each in (model, adapt(copy.deepcopy(model))))
        return cls(plain, adapted, batch, larger, largest(run(adapted, batch), run(plain, batch)))


@torch.no_grad()
def difference(
    architecture: Architecture, way: str, merged: bool = False, any_size: bool = True, plain: bool = False
) -> float:
    """The largest difference between outputs of an adapted model and of its export, over the adapter's effect on them.

    1 is what an export differs that has lost the adapter.

    Args:
        architecture: Whose tiny model is exported.
        way: One of `WAYS`.
        merged: Merge the adapter first.
        any_size: Leave the number of images open, and compare for two numbers.
        plain: Export the model without the adapter, which tells whose limit it is if it cannot be exported with it.
    """
    case = Case.of(architecture)
    subject = case.plain if plain else case.adapted
    batches = [case.batch, case.larger] if any_size else [case.batch]
    expected = [run(subject, each) for each in batches]
    if merged:
        subject.model.merge_adapter()
    exported = WAYS[way](subject, case.batch, any_size)
    got = [run(lambda *x: exported(x), each) for each in batches]
    return max(largest(one, other) for one, other in zip(got, expected, strict=True)) / case.effect


@torch.no_grad()
def rounding(architecture: Architecture) -> float:
    """How far the outputs of an adapted model in float32 are from those in float64, over the adapter's effect."""
    case = Case.of(architecture)
    exact = copy.deepcopy(case.adapted).double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in case.batch)
    return largest(run(case.adapted, case.batch), run(exact, batch)) / case.effect


def run(model: Callable[..., Sequence[Tensor]], batch: Batch) -> Sequence[Tensor]:
    torch.manual_seed(0)
    return model(*batch)


def largest(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(outputs, others, strict=True))
