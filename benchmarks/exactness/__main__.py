"""How far the implementation is from the paper's equations, evaluated slice by slice in float64.

    python -m benchmarks.exactness

For the three kinds of layer in a ViT-B block, both decompositions and every dtype, prints the largest error of the
forward pass and of the merged weight, relative to the largest reference value. The column "plain" is the error of the
frozen layer alone in the same dtype: what that dtype costs without any adapter.
"""

import argparse

import torch
from torch import Tensor, nn

from fact_peft import FacTConfig
from fact_peft.method.tensorization import Slices, tensorize
from fact_peft.tuner.factors import FacTStack
from fact_peft.tuner.layer import FacTLinear

LAYERS = {"q, k, v, o": (768, 768), "up": (768, 3072), "down": (3072, 768)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reference_cores(factors: dict[str, Tensor]) -> list[Tensor]:
    """Sigma_k of every slice in float64: learned (eq. 8), or the sum over t of P[k, t] C[t] (eq. 10)."""
    factors = {name: factor.detach().double() for name, factor in factors.items()}
    if "Sigma" in factors:
        return list(factors["Sigma"])
    P, C = factors["P"], factors["C"]
    return [sum(P[k, t] * C[t] for t in range(len(C))) for k in range(len(P))]


def reference_increment(factors: dict[str, Tensor], slices: Slices, scale: float) -> Tensor:
    """dW (in, out) of a layer in float64, slice by slice: dW_k = s U Sigma_k V^T, row-major over its blocks."""
    U, V = factors["U"].detach().double(), factors["V"].detach().double()
    cores = reference_cores(factors)
    increment = torch.zeros(slices.in_features, slices.out_features, dtype=torch.float64)
    k = slices.first
    for i in range(slices.num_in_blocks):
        for j in range(slices.num_out_blocks):
            rows = slice(i * slices.in_width, (i + 1) * slices.in_width)
            columns = slice(j * slices.out_width, (j + 1) * slices.out_width)
            increment[rows, columns] = scale * U @ cores[k] @ V.T
            k += 1
    return increment


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def errors(shape: tuple[int, int], decomposition: str, dtype: torch.dtype, rank: int) -> tuple[float, float, float]:
    """Relative errors of the frozen layer alone, of the adapted layer, and of the merged weight."""
    torch.manual_seed(0)
    slices = tensorize({"first": shape, "second": shape})["second"]
    config = FacTConfig(rank=rank, decomposition=decomposition, scale=10.0, init_weights=False)
    stack = FacTStack(slices.in_width, slices.out_width)
    stack.add_adapter("default", config, num_slices=2 * slices.count)
    # Every input of the comparison is representable in the dtype, so that only the arithmetic differs.
    layer = FacTLinear(nn.Linear(*shape).to(dtype))
    stack.to(dtype)
    layer.update_layer("default", slices, stack)
    layer.set_adapter("default")
    x = torch.randn(64, shape[0]).to(dtype)

    # Cloned, since merging replaces the weight.
    weight, bias = layer.base_layer.weight.double().clone(), layer.base_layer.bias.double()
    increment = reference_increment(stack.factors("default"), slices, config.scale)
    plain = x.double() @ weight.T + bias
    adapted = relative_error(layer(x), plain + x.double() @ increment)
    alone = relative_error(layer.base_layer(x), plain)
    layer.merge()
    return alone, adapted, relative_error(layer.weight, weight + increment.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="rank of the factors (default: 16)")
    rank = parser.parse_args().rank
    print(f"| dtype | layer | decomposition | plain | forward | merged weight |\n|{'---|' * 6}")
    for dtype in DTYPES:
        for name, shape in LAYERS.items():
            for decomposition in ("tt", "tk"):
                row = " | ".join(f"{error:.1e}" for error in errors(shape, decomposition, dtype, rank))
                print(f"| {str(dtype).removeprefix('torch.')} | {name} | {decomposition} | {row} |")


if __name__ == "__main__":
    main()
