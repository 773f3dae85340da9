"""What FacT can do beside PEFT's LoRA and its methods with shared parameters, every cell from a run.

    python -m benchmarks.coverage.features                            # prints the table
    python -m benchmarks.coverage.features --write docs/features.md   # and puts it between the markers of that file

Each feature is a short function that fails, by an exception or an assertion, where a method cannot do it. All run on
the same tiny random ViT; the methods that need them get the names of its linear layers.
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter as hotswap_lora
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import fact_peft
from benchmarks.reporting.markdown import write_generated
from fact_peft import FacTConfig

COMMAND = "python -m benchmarks.coverage.features"
SHAPE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
SETTINGS = {"target_modules": LINEARS, "modules_to_save": ["classifier"]}

# Initialised so that an untrained adapter changes the output, where the method can.
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "FacT": partial(FacTConfig, rank=4, init_weights=False),
    "LoRA": partial(LoraConfig, r=4, init_lora_weights=False, **SETTINGS),
    "VeRA": partial(VeraConfig, r=4, init_weights=False, **SETTINGS),
    "VB-LoRA": partial(VBLoRAConfig, r=4, num_vectors=16, vector_length=16, init_logits_std=1.0, **SETTINGS),
    "UniLoRA": partial(UniLoraConfig, r=4, theta_d_length=64, init_weights=False, **SETTINGS),
    "TinyLoRA": partial(TinyLoraConfig, r=2, u=4, init_weights="uniform", **SETTINGS),
}
BARE = {
    "FacT": FacTConfig,
    "LoRA": LoraConfig,
    "VeRA": VeraConfig,
    "VB-LoRA": VBLoRAConfig,
    "UniLoRA": UniLoraConfig,
    "TinyLoRA": TinyLoraConfig,
}
RANKS = {"FacT": {"rank": 2}, "TinyLoRA": {"r": 1}}


def vit(num_hidden_layers: int = 2) -> ViTForImageClassification:
    torch.manual_seed(7)
    return ViTForImageClassification(ViTConfig(num_labels=5, num_hidden_layers=num_hidden_layers, **SHAPE)).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images()).logits


def adapted(method: str, seed: int = 0, **settings: object) -> PeftModel:
    base, plain = vit(), scores(vit())
    torch.manual_seed(seed)
    model = get_peft_model(base, METHODS[method](**settings)).eval()
    disturb(model)
    assert not torch.allclose(scores(model), plain, atol=1e-3), "the adapter changes nothing"
    return model


def disturb(model: nn.Module) -> None:
    """Move every trainable number, heads included, as training would, so that whatever is lost is noticed."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model.train()(pixel_values=images()).logits.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def needs_no_target_modules(method: str) -> None:
    get_peft_model(vit(), BARE[method]())


def trains_the_classifier_unasked(method: str) -> None:
    model = get_peft_model(vit(), BARE[method](**({} if method == "FacT" else {"target_modules": LINEARS})))
    assert any("classifier" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def one_parameter_under_one_name(method: str) -> None:
    names = [name for name, p in adapted(method).named_parameters(remove_duplicate=False) if p.requires_grad]
    assert len(names) == len({id(p) for p in adapted(method).parameters() if p.requires_grad})


def reloads_bit_equal(method: str) -> None:
    model = adapted(method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(99)
        assert torch.equal(scores(PeftModel.from_pretrained(vit(), folder, adapter_name="other")), scores(model))


def saves_only_what_it_trains(method: str) -> None:
    model = adapted(method)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert sum(t.numel() for t in load_file(Path(folder, "adapter_model.safetensors")).values()) <= trained


def refuses_a_deeper_backbone(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapted(method).save_pretrained(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                PeftModel.from_pretrained(vit(num_hidden_layers=3), folder)
        except Exception:
            return
    raise AssertionError("loaded without a word")


def adapters_of_different_rank(method: str) -> None:
    model = adapted(method)
    first = scores(model)
    model.add_adapter("other", METHODS[method](**RANKS.get(method, {"r": 2})))
    model.set_adapter("other")
    second = scores(model)
    model.set_adapter("default")
    assert torch.equal(scores(model), first) and not torch.allclose(first, second)
    model.delete_adapter("other")
    assert not any(".other" in name for name in model.state_dict())


def merges(method: str) -> None:
    model = adapted(method)
    expected = scores(model)
    merged = model.merge_and_unload()
    close(scores(merged), expected)
    assert merged.state_dict().keys() == vit().state_dict().keys()


def injects(method: str) -> None:
    model = inject_adapter_in_model(METHODS[method](), vit())
    assert all(parameter.grad is None for parameter in model.parameters()) and gradients(model)


def transformers_add_and_load(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vit().save_pretrained(f"{folder}/base")
        model = AutoModelForImageClassification.from_pretrained(f"{folder}/base")
        model.add_adapter(METHODS[method]())
        model.save_pretrained(f"{folder}/adapter")
        loaded = AutoModelForImageClassification.from_pretrained(f"{folder}/base")
        loaded.load_adapter(f"{folder}/adapter")
        assert torch.equal(scores(loaded), scores(model))


def auto_model_from_adapter(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vit().save_pretrained(f"{folder}/base")
        base = AutoModelForImageClassification.from_pretrained(f"{folder}/base")
        model = get_peft_model(base, METHODS[method]())
        model.save_pretrained(f"{folder}/adapter")
        loaded = AutoModelForImageClassification.from_pretrained(f"{folder}/adapter", num_labels=5)
        close(scores(loaded), scores(model))


def converts_to_lora_exactly(method: str) -> None:
    model = adapted(method)
    expected = scores(model)
    convert = fact_peft.convert_to_lora if method == "FacT" else partial(peft.convert_to_lora, rank=4)
    config, state = convert(model)
    lora = get_peft_model(vit(), config)
    peft.set_peft_model_state_dict(lora, state)
    close(scores(lora), expected)


def sums_adapters(method: str) -> None:
    model = adapted(method, modules_to_save=[])
    model.add_adapter("other", METHODS[method](modules_to_save=[]))
    model.set_adapter("other")
    disturb(model)
    exact = {"combination_type": "cat"} if method == "LoRA" else {}
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum", **exact)
    layer = model.get_base_model().vit.layers[0].mlp.fc1
    expected = 0.7 * layer.get_delta_weight("default") - 1.3 * layer.get_delta_weight("other")
    close(layer.get_delta_weight("sum"), expected)


def one_adapter_per_image(method: str) -> None:
    model = adapted(method)
    first = scores(model)
    model.add_adapter("other", METHODS[method]())
    model.set_adapter("other")
    disturb(model)
    second = scores(model)
    assert not torch.allclose(first, second, atol=1e-3)
    expected = torch.stack([first[0], second[1], first[2], second[3]])
    with torch.no_grad():
        mixed = model(pixel_values=images(), adapter_names=["default", "other"] * 2).logits
    close(mixed, expected)


def swaps_without_recompiling(method: str) -> None:
    other = adapted(method, seed=1, modules_to_save=[])
    model = adapted(method, modules_to_save=[])
    count = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        count.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    scores(compiled)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        swap = fact_peft.hotswap_adapter if method == "FacT" else hotswap_lora
        swap(model, folder, adapter_name="default")
    close(scores(compiled), scores(other))
    assert len(count) == 1, f"{len(count)} compilations"


def compiles_in_one_graph(method: str) -> None:
    torch._dynamo.reset()
    model = adapted(method)
    expected = scores(model)
    close(scores(torch.compile(model, backend="eager", fullgraph=True)), expected)


def checkpoints(method: str, use_reentrant: bool) -> None:
    model = adapted(method)
    expected = gradients(model)
    base = model.get_base_model()
    # Newer versions of transformers have another name for it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    base.vit.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    for one, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, other)


def trains_on_int8(method: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = vit()
    quantize_(base, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "vit." in name)
    model = get_peft_model(base, METHODS[method]())
    assert all(gradient.isfinite().all() for gradient in gradients(model))


def copies_and_pickles(method: str) -> None:
    model = adapted(method)
    expected = scores(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    assert torch.equal(scores(model), expected) and not torch.allclose(scores(copied), expected)


def conv1d(method: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(transformers.pytorch_utils.Conv1D(32, 32))
    settings = {"modules_to_save": [], "target_modules": ["0"], "fan_in_fan_out": True}
    if method == "TinyLoRA":
        del settings["fan_in_fan_out"]
    model = get_peft_model(base, METHODS[method](**settings)).eval()
    x = torch.randn(3, 32)
    expected = model(x)
    close(model.merge_and_unload()(x), expected)


FEATURES: dict[str, Callable[[str], None]] = {
    "needs no target_modules on a ViT": needs_no_target_modules,
    "trains and saves the classifier unasked": trains_the_classifier_unasked,
    "every trained parameter under one name": one_parameter_under_one_name,
    "reloads bit-equal under another name and seed": reloads_bit_equal,
    "saves no more than it trains": saves_only_what_it_trains,
    "refuses, or warns on, a deeper backbone": refuses_a_deeper_backbone,
    "adapters of different rank in one model; delete": adapters_of_different_rank,
    "merge_and_unload": merges,
    "inject_adapter_in_model": injects,
    "transformers: add_adapter, load_adapter": transformers_add_and_load,
    "transformers: AutoModel.from_pretrained(adapter)": auto_model_from_adapter,
    "converts to LoRA of the same rank, exactly": converts_to_lora_exactly,
    "add_weighted_adapter, exact": sums_adapters,
    "one adapter per image (adapter_names)": one_adapter_per_image,
    "torch.compile in one graph": compiles_in_one_graph,
    "hot-swap without recompilation": swaps_without_recompiling,
    "checkpointing, non-reentrant: same gradients": partial(checkpoints, use_reentrant=False),
    "checkpointing, reentrant: same gradients": partial(checkpoints, use_reentrant=True),
    "trains on weights quantised by torchao's quantize_": trains_on_int8,
    "deepcopy is independent": copies_and_pickles,
    "Conv1D": conv1d,
}


def cell(feature: Callable[[str], None], method: str, verbose: bool) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if feature is not refuses_a_deeper_backbone:
                warnings.simplefilter("ignore")
            feature(method)
    except Exception as error:
        if verbose:
            print(f"  {method}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return "no"
    return "yes"


def table(verbose: bool = False) -> str:
    """The Markdown table of all features and methods."""
    lines = [f"| | {' | '.join(METHODS)} |", f"|{'---|' * (len(METHODS) + 1)}"]
    for name, feature in FEATURES.items():
        if verbose:
            print(name)
        lines.append(f"| {name} | {' | '.join(cell(feature, method, verbose) for method in METHODS)} |")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return "\n".join([*lines, "", f"Versions: {versions}, fact_peft {fact_peft.__version__}; CPU."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file to put the table in, between its markers")
    parser.add_argument("--verbose", action="store_true", help="print why a method fails")
    arguments = parser.parse_args()
    result = table(arguments.verbose)
    print(result)
    if arguments.write:
        write_generated(arguments.write, COMMAND, result)


if __name__ == "__main__":
    main()
