"""A FacT adapter as a LoRA, and under torch.compile: errors, seconds, recompilations, graph breaks.

    python -m benchmarks.exactness.conversion

On a ViT-B/16 with random weights and a random adapter: how far the logits of the converted LoRA are from those of the
FacT adapter, relative to the largest logit, and how long the conversion takes beside an SVD of every increment, which
is what PEFT does for other methods. Then, on a tiny ViT, what torch.compile makes of the forward pass, of training and
of hot-swapping.
"""

import argparse
import tempfile
import time

import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from fact_peft import FacTConfig, FacTLinear, convert_to_lora, hotswap_adapter, save_as_lora

TINY = ViTConfig(
    image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)


def adapted(config: ViTConfig, decomposition: str, rank: int, seed: int = 0) -> PeftModel:
    """The same random backbone with a random adapter."""
    torch.manual_seed(1)
    vit = ViTForImageClassification(config)
    torch.manual_seed(seed)
    return get_peft_model(vit, FacTConfig(rank=rank, decomposition=decomposition, init_weights=False)).eval()


def conversion(decomposition: str, rank: int) -> tuple[float, float, float]:
    """Relative error of the logits, seconds of the conversion, seconds of an SVD of every increment."""
    model = adapted(ViTConfig(), decomposition, rank)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        start = time.perf_counter()
        convert_to_lora(model)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        for layer in model.modules():
            if isinstance(layer, FacTLinear):
                torch.linalg.svd(layer.get_delta_weight("default"), full_matrices=False)
        seconds_svd = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            save_as_lora(model, folder)
            lora = PeftModel.from_pretrained(model.unload(), folder)
        error = (lora(pixel_values=images).logits - expected).abs().max() / expected.abs().max()
    return error.item(), seconds, seconds_svd


def compilation(decomposition: str) -> tuple[int, int, int]:
    """Graph breaks of forward and backward, compilations in evaluation, and after swapping in two more adapters."""
    model = adapted(TINY, decomposition, rank=4)
    images = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(model)(pixel_values=images).graph_break_count
    breaks += torch._dynamo.explain(model.train())(pixel_values=images).graph_break_count
    torch._dynamo.reset()
    compilations: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model.eval(), backend=backend)
    with torch.no_grad():
        compiled(pixel_values=images)
        first = len(compilations)
        for seed in (2, 3):
            with tempfile.TemporaryDirectory() as folder:
                adapted(TINY, decomposition, rank=4, seed=seed).save_pretrained(folder)
                hotswap_adapter(compiled, folder)
            compiled(pixel_values=images)
    return breaks, first, len(compilations) - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="rank of the factors (default: 16)")
    parser.add_argument("--skip-conversion", action="store_true", help="only compile; the SVDs take half a minute")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if not arguments.skip_conversion:
        print(f"| method | relative error of LoRA's logits | seconds | seconds by SVD |\n|{'---|' * 4}")
        for decomposition in ("tt", "tk"):
            error, seconds, seconds_svd = conversion(decomposition, arguments.rank)
            print(f"| FacT-{decomposition.upper()} | {error:.1e} | {seconds:.2f} | {seconds_svd:.1f} |")
        print()
    print(f"| method | graph breaks | compilations | more after two hot-swaps |\n|{'---|' * 4}")
    for decomposition in ("tt", "tk"):
        breaks, first, more = compilation(decomposition)
        print(f"| FacT-{decomposition.upper()} | {breaks} | {first} | {more} |")


if __name__ == "__main__":
    main()
