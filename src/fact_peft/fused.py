r"""A frozen linear layer and its low-rank increment as one differentiable function.

    h = x A^T                   A (q, in)      what reads the input; q the rank of the increment
    y = x W^T + b + h B^T       B (out, q)     what writes the output

Written as separate operations this passes over activations more often than the mathematics asks for: the second term
of y goes through a fresh tensor, and so does the sum of the two gradients of x. Here both are added in place, to a
tensor that nobody else has seen. With g the gradient of y,

    dh = g B        dB = g^T h        dA = dh^T x        dx = g W + dh A

The rows of B may also be one output block of several (`expand`): then g and h are read block by block in the first
two. With dropout, h is h times its noise, and dh likewise. Letters as in `decomposition.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .decomposition import expand_


def is_fusable(base_layer: nn.Module) -> bool:
    """Whether `base_layer` can be computed from its weight and bias without calling it.

    Not if somebody else has a part in the call: hooks, with which ZeRO-3 and CPU offloading bring the weight, or a
    subclass, as quantisation and FSDP make. Not if the weight is trained, sharded, or no plain tensor. And not while
    the call is compiled, traced or transformed: the compiler fuses better by itself, and forward-mode differentiation
    and `torch.func` want plain operations.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(base_layer) is not nn.Linear:
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    called_plainly = not (
        base_layer._forward_pre_hooks
        or base_layer._forward_hooks
        or base_layer._backward_pre_hooks
        or base_layer._backward_hooks
        or "forward" in vars(base_layer)
    )
    weight = base_layer.weight
    shape = (base_layer.out_features, base_layer.in_features)
    trained = weight.requires_grad and torch.is_grad_enabled()
    return called_plainly and not trained and weight.shape == shape and type(weight.data) is Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies `x` now; None if it leaves it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, noise: Tensor | None
) -> Tensor:
    """y of `LowRankLinear`. Without gradients and with many rows, the increment is added to the weight beforehand."""
    # W + dW goes to fresh memory, so it has to be several times smaller than x and y, over which it saves passes: on a
    # ViT-B/16 it does not pay with 4 images and does with 16. In half precision it would lose small digits of dW.
    worthwhile = 4 * weight.numel() <= x.shape[:-1].numel() * sum(weight.shape)
    if torch.is_grad_enabled() or noise is not None or not worthwhile or weight.dtype.itemsize < 4:
        return LowRankLinear.apply(x, weight, bias, A, B, noise)[0]
    return nn.functional.linear(x, torch.addmm(weight, B, A), bias)


class LowRankLinear(torch.autograd.Function):
    """``apply(x, weight, bias, A, B, noise)`` is (y, h); see above.

    x (..., in), weight (out, in), bias (out) or None, A (q, in), B (out, q) or one block of it (out / n, q / n), noise
    (rows of x, q) or None, all of one dtype. h is an output only so that second derivatives can go through it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        # Row-major in A and in B is what a product with so few columns is fastest with, and column-major in backward.
        h = rows @ A.contiguous().t()
        if noise is not None:
            h.mul_(noise)
        y = expand_(h, B.contiguous(), onto=nn.functional.linear(rows, weight, bias))
        ctx.save_for_backward(x, weight, A, B, noise, h)
        return y.view(*x.shape[:-1], -1), h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, dh_direct = grads
        x, weight, A, B, noise, h = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dx = dbias = dA = dB = None
        with without_autocast(x):
            g_rows, x_rows = g.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
            g_blocks = g_rows.reshape(-1, B.shape[0])
            if needs_bias:
                dbias = g_rows.sum(0)
            if needs_B:
                dB = (h.view(-1, B.shape[1]).t() @ g_blocks).t()
            dh = (g_blocks @ B.t().contiguous().t()).view(h.shape) + dh_direct
            if noise is not None:
                dh = dh * noise
            if needs_A:
                dA = dh.t() @ x_rows
            if needs_x:
                dx = (g_rows @ weight).addmm_(dh, A.t().contiguous().t()).view(x.shape)
        return dx, None, dbias, dA, dB, None
