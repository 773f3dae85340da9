"""The methods that are compared, one row each. What they adapt is found by structure, whatever the backbone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import (
    FourierFTConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from benchmarks.frontier.bottlenecks import Bottlenecks
from benchmarks.frontier.data_starts import Start, eva, from_gradients, lora_ga
from benchmarks.frontier.losses import Loss, consistent, cross_entropy
from benchmarks.frontier.prompts import DeepPrompts
from benchmarks.frontier.tasks import Labelled
from fact_peft import FacTConfig
from fact_peft.architecture.blocks import find_block_linears, stream_width
from fact_peft.architecture.heads import find_classifiers

# Leaves trainable in a backbone what the method trains, the head included; may look at the training images.
Adapt = Callable[[nn.Module, Labelled], nn.Module]
FIRST_RATE = 4e-3  # of the search, and of every head
QUERY_AND_VALUE = r".*\.(query|value|q_proj|v_proj)"


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        family: What its points in the plot have in common.
        adapt: See `Adapt`.
        multipliers: Learning rates relative to the one searched, by a part of the parameter's name.
        own_head_rate: Whether the head has the fixed learning rate of all heads, else the one searched.
        first_rate: The first learning rate tried.
        start: What looks at training images before training, after `adapt`.
        loss: What training minimises.
    """

    family: str
    adapt: Adapt
    multipliers: Mapping[str, float] = field(default_factory=dict)
    own_head_rate: bool = True
    first_rate: float = FIRST_RATE
    start: Start | None = None
    loss: Loss = cross_entropy


def by_module(model: nn.Module, train: Labelled, trains: Callable[[nn.Module, str], bool]) -> nn.Module:
    """Train the heads, and those other parameters that `trains` picks by module and name in it."""
    model.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(trains(module, name))
    return train_heads(model)


def train_heads(model: nn.Module) -> nn.Module:
    for name in find_classifiers(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def by_wrapper(model: nn.Module, train: Labelled, wrapper: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    """Train the heads and what the wrapper adds to the frozen backbone."""
    return wrapper(train_heads(model.requires_grad_(False)), **settings)


def config_for(model: nn.Module, config_cls: type[PeftConfig], **settings: Any) -> PeftConfig:
    """The config of a method of PEFT on the linear layers that FacT finds by itself, with the heads trained."""
    targets = list(find_block_linears(model))
    return config_cls(**{"target_modules": targets, "modules_to_save": find_classifiers(model), **settings})


def by_peft(model: nn.Module, train: Labelled, config_cls: type[PeftConfig], **settings: Any) -> nn.Module:
    return get_peft_model(model, config_for(model, config_cls, **settings))


def by_fourier(model: nn.Module, train: Labelled, n_frequency: int) -> nn.Module:
    """FourierFT; its scaling of 150 is made for a width of 768, and dW shrinks with the square of the width."""
    width = stream_width(find_block_linears(model).values())
    return by_peft(model, train, FourierFTConfig, n_frequency=n_frequency, scaling=150 * (width / 768) ** 2)


def by_ia3(model: nn.Module, train: Labelled) -> nn.Module:
    """(IA)3 on all these layers; those that narrow scale what they read, the others what they write."""
    narrowing = [name for name, (inputs, outputs) in find_block_linears(model).items() if inputs > outputs]
    return by_peft(model, train, IA3Config, feedforward_modules=narrowing)


def by_fact(model: nn.Module, train: Labelled, **settings: Any) -> nn.Module:
    return get_peft_model(model, FacTConfig(**settings))


def fact(decomposition: str, rank: int, multipliers: Mapping[str, float] | None = None, **settings: Any) -> Method:
    """FacT as the authors start it, at scale 1."""
    adapt = partial(by_fact, **{"decomposition": decomposition, "rank": rank, "init_weights": True, **settings})
    return Method(f"FacT-{decomposition.upper()}", adapt, multipliers or {})


def orthogonal(decomposition: str, rank: int, scale: float | None = None, **settings: Any) -> Method:
    """Orthonormal U and V, zero cores, and scale 32 / r, so that cores move that many times as far as U and V."""
    scale = 32 / rank if scale is None else scale
    start = {"scale": scale, "init_weights": "orthogonal"}
    adapt = partial(by_fact, decomposition=decomposition, rank=rank, **start, **settings)
    return Method(f"FacT-{decomposition.upper()}, orthogonal", adapt)


def gradients(decomposition: str, rank: int, scale: float | None = None) -> Method:
    """As `orthogonal`, with U and V from the gradients of the task."""
    family = f"FacT-{decomposition.upper()}, gradients"
    return replace(orthogonal(decomposition, rank, scale), family=family, start=from_gradients)


def other(family: str, config_cls: type[PeftConfig], first_rate: float = FIRST_RATE, **settings: Any) -> Method:
    return Method(family, partial(by_peft, config_cls=config_cls, **settings), first_rate=first_rate)


def by_start(family: str, start: Callable[..., nn.Module], rank: int) -> Method:
    """LoRA at scale 1, which the start makes itself."""
    make_config = partial(config_for, config_cls=LoraConfig, r=rank, lora_alpha=rank)
    return Method(family, lambda model, train: model, start=partial(start, make_config=make_config))


DROPOUT = {
    "FacT-TT r=16, dropout": orthogonal("tt", 16, fact_dropout=0.1),
    "LoRA r=1, dropout": other("LoRA", LoraConfig, r=1, lora_alpha=1, lora_dropout=0.1),
}
FULL = partial(by_module, trains=lambda module, name: True)
METHODS: dict[str, Method] = {
    "linear probe": Method("linear probe", partial(by_module, trains=lambda module, name: False), own_head_rate=False),
    # What was pretrained wants smaller steps than what starts at zero.
    "full fine-tuning": Method("full fine-tuning", FULL, first_rate=1e-4),
    "BitFit": Method("BitFit", partial(by_module, trains=lambda module, name: name == "bias")),
    "LN tuning": Method("LN tuning", partial(by_module, trains=lambda module, name: isinstance(module, nn.LayerNorm))),
    "VPT-deep p=10": Method("VPT-deep", partial(by_wrapper, wrapper=DeepPrompts, num_prompts=10)),
    "AdaptFormer h=8": Method("AdaptFormer", partial(by_wrapper, wrapper=Bottlenecks, width=8)),
    **{f"LoRA r={rank}": other("LoRA", LoraConfig, r=rank, lora_alpha=rank) for rank in (1, 2)},  # scale 1, as FacT's
    "LoRA r=1, q and v": other("LoRA", LoraConfig, r=1, lora_alpha=1, target_modules=QUERY_AND_VALUE),
    "LoRA r=8": other("LoRA", LoraConfig, first_rate=2e-3, r=8, lora_alpha=8),  # its better rate at 42 px
    **{f"LoRA r={rank}, EVA": by_start("LoRA, EVA", eva, rank) for rank in (1, 8)},
    **{f"LoRA r={rank}, LoRA-GA": by_start("LoRA-GA", lora_ga, rank) for rank in (1, 8)},
    "DoRA r=8": other("DoRA", LoraConfig, r=8, lora_alpha=8, use_dora=True),
    "VeRA r=256": other("VeRA", VeraConfig, r=256),
    "LoKr r=8": other("LoKr", LoKrConfig, r=8),
    "(IA)3": Method("(IA)3", by_ia3),
    "UniLoRA d=4096": other("UniLoRA", UniLoraConfig, r=4, theta_d_length=4096),
    # The authors train the spectrum at rates near 0.1.
    "FourierFT n=1000": Method("FourierFT", partial(by_fourier, n_frequency=1000), multipliers={"spectrum": 16.0}),
    **{f"FacT-TT r={rank}": fact("tt", rank) for rank in (1, 4, 8, 16, 32)},
    **{f"FacT-TK r={rank}": fact("tk", rank) for rank in (8, 16, 32)},
    **{f"FacT-TT r={rank}, orthogonal": orthogonal("tt", rank) for rank in (1, 4, 8, 16, 32)},
    **{f"FacT-TK r={rank}, orthogonal": orthogonal("tk", rank) for rank in (8, 16, 32)},
    # These have the default scale, 32 / sqrt(r). The rows of Tucker above have 32 / r, the default when they were run.
    **{f"FacT-CP r={rank}, orthogonal": orthogonal("cp", rank, 32 / rank**0.5) for rank in (16, 32, 64)},
    **{f"FacT-TK r={rank}, default scale": orthogonal("tk", rank, 32 / rank**0.5) for rank in (8, 16, 24, 32)},
    **{f"FacT-TT r={rank}, gradients": gradients("tt", rank) for rank in (4, 16, 32)},
    **{f"FacT-TK r={rank}, gradients": gradients("tk", rank) for rank in (8, 16, 32)},
    "FacT-TK r=32, gradients, default scale": gradients("tk", 32, 32 / 32**0.5),
    **DROPOUT,
    **{f"{name}, two passes": replace(method, loss=consistent) for name, method in DROPOUT.items()},
}
