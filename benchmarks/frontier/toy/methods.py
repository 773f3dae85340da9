"""The rows of the toy frontier: settings for a width of 64, and variants of FacT, tried where it loses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import (
    FourierFTConfig,
    LoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import ViTForImageClassification

from benchmarks.frontier.methods import FULL, Method, by_module, by_peft, fact, orthogonal, other
from benchmarks.frontier.tasks import Labelled
from benchmarks.frontier.toy.backbone import normalise
from fact_peft import FacTConfig
from fact_peft.architecture.blocks import find_block_linears
from fact_peft.method.tensorization import tensorize


def by_started_fact(
    model: ViTForImageClassification,
    train: Labelled,
    decomposition: str,
    rank: int,
    scale: float = 1.0,
    *,
    init: Callable[[dict[str, Tensor], Tensor, Tensor], None],
) -> nn.Module:
    """FacT, initialised by `init`."""
    weights = slices_of(model, {name: model.get_submodule(name).weight for name in find_block_linears(model)})
    gradients = slices_of(model, mean_gradients(model, train)) if init is from_gradients else weights
    config = FacTConfig(rank=rank, decomposition=decomposition, scale=scale, init_weights=True)
    model = get_peft_model(model, config)
    (stack,) = model.get_base_model().factors.values()
    with torch.no_grad():
        init({name: factor.data for name, factor in stack.factors("default").items()}, weights, gradients)
    return model


def slices_of(model: nn.Module, matrices: Mapping[str, Tensor]) -> Tensor:
    """The slices (N, d, d), in the order of the stack, of matrices (out, in) by layer name."""
    slices = []
    for name, owned in tensorize(find_block_linears(model)).items():
        blocks = matrices[name].detach().t().unflatten(1, (owned.num_out_blocks, -1))
        blocks = blocks.unflatten(0, (owned.num_in_blocks, -1))
        slices.append(blocks.transpose(1, 2).flatten(0, 1))
    return torch.cat(slices)


def mean_gradients(model: ViTForImageClassification, train: Labelled) -> dict[str, Tensor]:
    """Gradients of the loss on the training images with respect to the frozen weights, by layer name.

    A random head would decide them, so it is fitted first, on the features of the frozen backbone.
    """
    images = normalise(train.images)
    with torch.no_grad():
        features = torch.cat([model.vit(batch).last_hidden_state[:, 0] for batch in images.split(100)])
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
    for _ in range(100):
        nn.functional.cross_entropy(model.classifier(features), train.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: model.get_submodule(name).weight for name in find_block_linears(model)}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch, labels in zip(images.split(100), train.labels.split(100), strict=True):
        loss = model(pixel_values=batch, labels=labels).loss
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            gradients[name] += gradient
    return gradients


def leading(slices: Tensor, rank: int, axis: int) -> Tensor:
    """The `rank` leading directions (d, rank) of slices (N, d, e) along axis 1 or 2, by higher-order SVD."""
    unfolded = slices.movedim(axis, 0).flatten(1)
    return torch.linalg.eigh(unfolded @ unfolded.t()).eigenvectors[:, -rank:].flip(1)


def zero_core(factors: dict[str, Tensor], U: Tensor, V: Tensor) -> None:
    """U and V as given, and zero where it makes every core zero; what else is in the core stays as it is."""
    factors["U"].copy_(U)
    factors["V"].copy_(V)
    factors["Sigma" if "Sigma" in factors else "P"].zero_()


def orthonormal_start(factors: dict[str, Tensor], weights: Tensor, gradients: Tensor) -> None:
    """V = 0 as the authors have it; the columns of U orthonormal, and every core of TT orthogonal."""
    nn.init.orthogonal_(factors["U"])
    for core in factors["Sigma"]:
        nn.init.orthogonal_(core)


def from_weights(factors: dict[str, Tensor], weights: Tensor, gradients: Tensor) -> None:
    """U and V span the leading directions of the frozen weights, cores zero."""
    rank = factors["U"].shape[1]
    zero_core(factors, leading(weights, rank, 1), leading(weights, rank, 2))


def from_gradients(factors: dict[str, Tensor], weights: Tensor, gradients: Tensor) -> None:
    """U and V span the leading directions of the weights' gradients, cores zero."""
    rank = factors["U"].shape[1]
    zero_core(factors, leading(gradients, rank, 1), leading(gradients, rank, 2))


def started(decomposition: str, rank: int, init: Callable[..., None], **settings: Any) -> Method:
    adapt = partial(by_started_fact, decomposition=decomposition, rank=rank, init=init, **settings)
    return Method(f"FacT-{decomposition.upper()}", adapt)


# The published settings, or PEFT's defaults, as far as they fit a backbone this narrow.
METHODS: dict[str, Method] = {
    "linear probe": Method("linear probe", partial(by_module, trains=lambda module, name: False), own_head_rate=False),
    "full fine-tuning": Method("full fine-tuning", FULL),
    **{f"FacT-TT r={rank}": fact("tt", rank) for rank in (8, 4, 16, 2)},
    **{
        f"LoRA r={rank}": other("LoRA", LoraConfig, r=rank, lora_alpha=rank)  # scale 1, as FacT's
        for rank in (1, 4, 16)
    },
    **{f"FacT-TK r={rank}": fact("tk", rank) for rank in (8, 16, 4, 32, 12)},
    **{f"FacT-CP r={rank}": fact("cp", rank) for rank in (8, 32)},
    **{f"FacT-CP r={rank}, orthogonal": orthogonal("cp", rank) for rank in (8, 32)},
    **{f"FacT-TT r={rank}, orthogonal": orthogonal("tt", rank) for rank in (8, 4, 16, 2)},
    **{f"FacT-TK r={rank}, orthogonal": orthogonal("tk", rank) for rank in (8, 12, 16, 4, 32)},
    "BitFit": Method("BitFit", partial(by_module, trains=lambda module, name: name == "bias")),
    "LN tuning": Method("LN tuning", partial(by_module, trains=lambda module, name: isinstance(module, nn.LayerNorm))),
    "VeRA r=64": other("VeRA", VeraConfig, r=64),
    # The authors train the logits at ten times the rate of the vectors.
    "VB-LoRA r=4": Method(
        "VB-LoRA",
        partial(by_peft, config_cls=VBLoRAConfig, r=4, num_vectors=90, vector_length=32),
        multipliers={"vblora_logits": 10.0},
    ),
    **{f"UniLoRA d={size}": other("UniLoRA", UniLoraConfig, r=4, theta_d_length=size) for size in (256, 4096)},
    **{f"TinyLoRA u={size}": other("TinyLoRA", TinyLoraConfig, r=2, u=size) for size in (64, 8)},
    # The default scaling of 150 is made for a width of 768; dW shrinks with the square of the width. The authors train
    # the spectrum at rates near 0.1.
    **{
        f"FourierFT n={number}, scaling 1": Method(
            "FourierFT",
            partial(by_peft, config_cls=FourierFTConfig, n_frequency=number, scaling=1.0),
            multipliers={"spectrum": 16.0},
        )
        for number in (100, 1000)
    },
    "FourierFT n=100": other("FourierFT", FourierFTConfig, n_frequency=100),
}

# What is varied on the method before the first comma.
REMEDIES: dict[str, Method] = {
    "FacT-TT r=8, from gradients": started("tt", 8, from_gradients),
    "FacT-TT r=8, V x 16": fact("tt", 8, {"fact_V": 16.0}),
    "FacT-TT r=8, scale 10": fact("tt", 8, scale=10.0),
    "FacT-TT r=8, orthogonal at scale 1": orthogonal("tt", 8, scale=1.0),
    **{
        f"FacT-{decomposition.upper()} r={rank}, orthogonal at scale 4": orthogonal(decomposition, rank, scale=4.0)
        for decomposition, rank in (("tt", 4), ("tt", 16), ("tk", 12), ("tk", 16))
    },
    "FacT-TT r=8, from weights": started("tt", 8, from_weights),
    "FacT-TT r=8, from weights, scale 4": started("tt", 8, from_weights, scale=4.0),
    "FacT-TT r=8, from gradients, scale 4": started("tt", 8, from_gradients, scale=4.0),
    "FacT-TT r=8, orthogonal with V = 0": started("tt", 8, orthonormal_start),
    "FacT-TT r=8, Sigma x 4": fact("tt", 8, {"fact_Sigma": 4.0}),
    "FacT-TT r=8, one rate": replace(fact("tt", 8), own_head_rate=False),
    "FacT-TK r=16, from gradients": started("tk", 16, from_gradients),
    "FacT-TK r=16, V x 16": fact("tk", 16, {"fact_V": 16.0}),
    "FacT-TK r=16, P x 4": fact("tk", 16, {"fact_P": 4.0}),
}
