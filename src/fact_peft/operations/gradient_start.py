"""Initialize U and V from the gradients of a few batches of the task."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..adapter.config import fact_config
from ..adapter.field_checks import is_integer
from ..method.gradient_sketch import GradientSketch, random_orthonormal
from ..tuner.factors import FacTStack
from ..tuner.layer import FacTLinear
from ..tuner.lifecycle import check_not_merged, own_stacks

Loss = Callable[[nn.Module, Any], Tensor]


def initialize_from_gradients(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    num_batches: int = 8,
    loss: Loss | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    show_progress_bar: bool = True,
) -> None:
    """Start U and V of a new adapter with the directions in which the loss of the task changes most.

        model = get_peft_model(vit, FacTConfig())
        initialize_from_gradients(model, dataloader)

    The batches are run twice, forward and backward, through the model in evaluation mode. The gradients of each layer
    are scaled to norm 1, and those of all slices of a stack are decomposed together; see `method/gradient_sketch.py`.
    No gradient is kept whole. Only U and V change. The cores stay zero, so that the outputs of the model stay the same.
    Under ``torch.distributed`` all processes must call this function, each with its own batches, and all get the same
    factors.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers; before or after it is wrapped for DDP.
        dataloader: Batches, of which the first `num_batches` are held in memory.
        num_batches: The number of batches to use; all of them if there are fewer.
        loss: A function of model and batch. None: the batch is a dict, and the loss is ``model(**batch).loss``.
        adapter_name: The adapter, which has the default initialization of `FacTConfig` and is not trained yet.
        seed: Seed of the random directions, and of torch while the dataloader is read.
        show_progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If there is no such adapter, its cores are not zero, or it is merged; if the model is sharded by
            FSDP, ZeRO-3 or tensor parallelism; if there is no batch; if the model returns no loss, or one without a
            gradient; or if a gradient is not finite. The adapter is then as it was.
    """
    if not is_integer(num_batches) or num_batches < 1:
        raise ValueError(f"num_batches={num_batches!r} is not a whole number of at least 1; pass one, such as 8.")
    check_whole(model)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    check_untrained(model, adapter_name)
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[FacTStack, GradientSketch] = {}
    with undisturbed(model):
        for stack in own_stacks(model, adapter_name):
            U, cores, V = stack.terms(adapter_name)
            sketches[stack] = GradientSketch((len(cores), len(U), len(V)), U.shape[1], generator, like=U)
        torch.manual_seed(seed)
        batches = list(islice(dataloader, num_batches))
        check_some(batches, sketches)
        with tqdm(total=2 * len(batches), desc="gradients", disable=not show_progress_bar) as progress:
            add_gradients(model, batches, loss or model_loss, sketches, adapter_name, progress)
            for stack, sketch in sketches.items():
                layers = [layer for layer in layers_of(model, adapter_name) if layer.fact_stacks[adapter_name] is stack]
                sketch.scale_layers(layer.fact_slices[adapter_name] for layer in layers)
                sketch.turn()  # from random directions to those found
            add_gradients(model, batches, loss or model_loss, sketches, adapter_name, progress)
    write(sketches, adapter_name, generator)


def layers_of(model: nn.Module, adapter_name: str) -> list[FacTLinear]:
    """The layers of `model` that an adapter adapts."""
    stacks = own_stacks(model)
    return [m for m in model.modules() if isinstance(m, FacTLinear) and m.fact_stacks.get(adapter_name) in stacks]


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over processes."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape") for parameter in model.parameters()
    )
    if sharded:
        raise ValueError(
            "The model is sharded over processes (FSDP, ZeRO-3 or tensor parallelism), and a start from gradients "
            "needs whole layers; call initialize_from_gradients before the model is sharded, or train with DDP."
        )


def check_untrained(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter whose cores are not zero, or that is merged."""
    fact_config(model, adapter_name)
    check_not_merged(model, adapter_name, "initialized")
    for stack in own_stacks(model, adapter_name):
        if stack.terms(adapter_name)[1].any():
            raise ValueError(
                f"The cores of adapter_name={adapter_name!r} are not zero: it is trained already, or was started with "
                "init_weights=True or False; make a new one with init_weights='orthogonal', which is the default."
            )


def check_some(batches: list[Any], sketches: Mapping[FacTStack, GradientSketch]) -> None:
    """Refuse to start if no process has a batch."""
    count = next(iter(sketches.values())).left.new_tensor(len(batches))
    sum_over_processes([count])
    if not count:
        raise ValueError(
            "dataloader has no batches; pass an iterable of batches, and not an iterator that was used before."
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode and freeze it; restore it and the random number generators at the end."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(list(devices)):
            model.eval()
            for parameter in trained:  # their gradients are not needed
                parameter.requires_grad_(False)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers returns."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is of type {type(batch).__name__}, which is no dict of the model's arguments; pass "
            "loss=lambda model, batch: ..., or a collate_fn that makes dicts."
        )
    device = next(model.parameters()).device
    outputs = model(**send_to_device(dict(batch), device))
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for a batch of {', '.join(map(str, batch))}; add labels to the "
            "batches, take a model with a head, or pass loss=lambda model, batch: ...."
        )
    return loss


def add_gradients(
    model: nn.Module,
    batches: list[Any],
    loss: Loss,
    sketches: Mapping[FacTStack, GradientSketch],
    adapter_name: str,
    progress: tqdm,
) -> None:
    """Add the gradients of all batches of all processes to the sketches."""
    bad = None
    with watched(model, sketches, adapter_name):
        for number, batch in enumerate(batches):
            # A loss may take the labels out of its batch, which is run twice.
            value = loss(model, copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"The loss is no tensor of one number but {value!r:.100}; return the mean of the batch's."
                )
            inputs = leaves(value)
            if not inputs:
                raise ValueError(
                    "The loss has no gradient, or does not depend on an adapted layer; compute it with the model that "
                    "is passed, without torch.no_grad() and detach()."
                )
            if bad is None and not value.isfinite().all():
                bad = number
            torch.autograd.grad(value, inputs, allow_unused=True)
            progress.update()
    products = [product for sketch in sketches.values() for product in sketch.products]
    sum_over_processes(products)
    if not all(product.isfinite().all() for product in products):
        where = "the gradients" if bad is None else f"the loss of batch {bad}"
        raise ValueError(
            f"NaN or infinity in {where}; check the images and labels, and for float16 compute the loss in float32."
        )
    if not any(product.any() for product in products):
        raise ValueError(
            "The gradients of all adapted layers are zero; check that the loss depends on what the layers compute."
        )


def leaves(value: Tensor) -> list[Tensor]:
    """The leaf tensors that `value` was computed from: all of its graph is run for their gradients."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def watched(model: nn.Module, sketches: Mapping[FacTStack, GradientSketch], adapter_name: str) -> Iterator[None]:
    """Within the context, a backward pass adds the gradients of every layer to the sketch of its stack."""

    def before(layer: FacTLinear, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        # The inputs of the first layers need no gradient, since all before them is frozen.
        return (x if x.requires_grad else x.detach().requires_grad_(torch.is_grad_enabled()), *args[1:])

    def after(layer: FacTLinear, args: tuple[Any, ...], y: Tensor) -> None:
        if y.requires_grad:
            sketch = sketches[layer.fact_stacks[adapter_name]]
            y.register_hook(partial(sketch.add, layer.fact_slices[adapter_name], args[0].detach()))

    def read(layer: FacTLinear, weight: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()

        def add_weight(gradient: Tensor) -> Tensor:
            G = gradient if layer.fan_in_fan_out else gradient.t()
            sketches[layer.fact_stacks[adapter_name]].add_gradient(layer.fact_slices[adapter_name], G)
            return gradient.new_zeros(()).expand_as(gradient)  # in its place, to free its memory

        weight.register_hook(add_weight)
        return weight

    with ExitStack() as hooks:
        for layer in layers_of(model, adapter_name):
            hooks.enter_context(layer.register_forward_pre_hook(before))
            hooks.enter_context(layer.register_forward_hook(after))
            layer.weight_hook = partial(read, layer)
            hooks.callback(delattr, layer, "weight_hook")
        yield


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor, in place, over the processes of ``torch.distributed``, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


@torch.no_grad()
def write(sketches: Mapping[FacTStack, GradientSketch], adapter_name: str, generator: torch.Generator) -> None:
    """Copy the directions found into U and V; those of a stack without gradients stay as they are."""
    for stack, sketch in sketches.items():
        if not sketch.weights.any():
            continue
        factors = stack.factors(adapter_name)
        rank = factors["U"].shape[1]
        for letter, directions in zip("UV", sketch.directions(rank), strict=True):
            factors[letter].copy_(directions @ random_orthonormal(rank, rank, generator))
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(factors[letter], src=0)  # processors may round differently
