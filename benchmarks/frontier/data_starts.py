"""Starts that look at training images first: FacT's from gradients, and PEFT's EVA and LoRA-GA."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from peft import EvaConfig, LoraGAConfig, PeftConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import preprocess_loraga
from torch import nn

from benchmarks.frontier.losses import Logits, cross_entropy
from benchmarks.frontier.tasks import Labelled
from fact_peft import initialize_from_gradients

NUM_BATCHES = 8  # that gradients are taken of; EVA takes as many as its components need to converge
MakeConfig = Callable[..., PeftConfig]  # of LoRA for a model, with further settings
# Starts a model from batches of training images; returns the model that is then trained.
Start = Callable[[nn.Module, Iterator[Labelled], Logits], nn.Module]


def from_gradients(model: nn.Module, batches: Iterator[Labelled], logits: Logits) -> nn.Module:
    """U and V of FacT from gradients."""
    settings = {"seed": torch.initial_seed(), "show_progress_bar": False}
    initialize_from_gradients(model, batches, loss=partial(cross_entropy, logits=logits), **settings)
    return model


def eva(model: nn.Module, batches: Iterator[Labelled], logits: Logits, make_config: MakeConfig) -> nn.Module:
    """LoRA whose A, and ranks, come from the inputs of the layers (EVA)."""
    model = get_peft_model(model, make_config(model, init_lora_weights="eva", eva_config=EvaConfig()))
    initialize_lora_eva_weights(
        model,
        [batch.images for batch in batches],
        forward_fn=logits,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, images, name: inputs[0].flatten(0, -2).float(),
        show_progress_bar=False,
    )
    return model


def lora_ga(model: nn.Module, batches: Iterator[Labelled], logits: Logits, make_config: MakeConfig) -> nn.Module:
    """LoRA whose A and B come from the gradients of the layers (LoRA-GA)."""
    config = make_config(model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def add_gradients() -> None:
        for batch in islice(batches, NUM_BATCHES):
            cross_entropy(model, batch, logits).backward()

    preprocess_loraga(model, config, add_gradients)
    return get_peft_model(model, config)
