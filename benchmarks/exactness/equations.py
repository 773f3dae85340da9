"""The paper's equations slice by slice in float64, and how far a layer is from them."""

import torch
from torch import Tensor, nn

from fact_peft import FacTConfig
from fact_peft.method.tensorization import Slices, tensorize
from fact_peft.tuner.factors import FacTStack
from fact_peft.tuner.layer import FacTLinear

LAYERS = {"q, k, v, o": (768, 768), "up": (768, 3072), "down": (3072, 768)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reference_cores(factors: dict[str, Tensor]) -> list[Tensor]:
    """Sigma_k of every slice in float64: learned (eq. 8), the sum over t of P[k, t] C[t] (eq. 10), or diagonal."""
    factors = {name: factor.detach().double() for name, factor in factors.items()}
    if "W" in factors:
        return [torch.diag(row) for row in factors["W"]]
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
    stack = FacTStack(slices.in_width, slices.out_width, configs={})
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
