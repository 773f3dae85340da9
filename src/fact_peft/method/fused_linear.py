r"""A frozen linear layer and its increment as one differentiable function.

    h_0 = x (I (x) U)                   what reads the input
    h = h_0 Core
    y = x W^T + b + s h (I (x) V)^T     what writes the output

Written as separate operations this passes over activations more often than the mathematics asks for: the last term of
y goes through a fresh tensor, and so does the sum of the two gradients of x. Here both are added in place, to a tensor
that nobody else has seen. With g the gradient of y,

    dh = g (I (x) V)        dh_0 = dh Core^T        dx = g W + s dh_0 (I (x) U)^T
    dV = s g^T h            dCore = s h_0^T dh      dU = s x^T dh_0

where dh and dh_0 lack the factor s, and the sums over rows in dU and dV also go over the blocks. With dropout, h is h
times its noise, and dh likewise. Letters as in `decomposition.py`.

The scale s comes last, in the precision of the factors: a gradient times 100 would often be more than float16 can hold.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import linear as linear_module
from torch.nn.modules import module as module_module

from .decomposition import blockwise, expand_, low_rank_pair


def is_fusable(base_layer: nn.Module) -> bool:
    """Whether `base_layer` can be computed from its weight and bias without calling it.

    Not if somebody else has a part in the call: hooks, with which ZeRO-3 and CPU offloading bring the weight, a
    subclass, as quantisation and FSDP make, or whoever has a part in every call, see `calls_are_watched`. Not if the
    weight is trained, sharded, or no plain tensor. And not while the call is compiled, traced or transformed: the
    compiler fuses better by itself, and forward-mode differentiation and `torch.func` want plain operations.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(base_layer) is not nn.Linear:
        return False
    if calls_are_watched():
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


def calls_are_watched() -> bool:
    """Whether somebody has a part in every call of an ``nn.Linear``: by hooks for all modules or a patched method."""
    if module_module._has_any_global_hook():
        return True
    # A patch is told by where it was written, also one older than this module or made with `functools.wraps`.
    home = {"forward": vars(linear_module), "__call__": vars(module_module), "_call_impl": vars(module_module)}
    return any(getattr(getattr(nn.Linear, name), "__globals__", None) is not home[name] for name in home)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies `x` now; None if it leaves it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    core: Tensor,
    V: Tensor,
    scale: float,
    noise: Tensor | None = None,
) -> Tensor:
    """y of `FusedLinear`. Without gradients and with many rows, the increment is added to the weight beforehand."""
    # Writing W + dW costs less than reading x and writing y once more if it is the smaller. In half precision it would
    # lose small digits of dW.
    worthwhile = weight.numel() <= x.shape[:-1].numel() * sum(weight.shape)
    if torch.is_grad_enabled() or noise is not None or not worthwhile or weight.dtype.itemsize < 4:
        return FusedLinear.apply(x, weight, bias, U, core, V, scale, noise)
    A, B = low_rank_pair(U, core, V, scale)
    return nn.functional.linear(x, torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype)), bias)


class FusedLinear(torch.autograd.Function):
    """``apply(x, weight, bias, U, core, V, scale, noise)`` is y; see above.

    x (..., a d), weight (b e, a d) and bias (b e) or None of one dtype, in which everything is multiplied; U (d, r),
    core (a r, b r), V (e, r), a float scale, noise (rows of x, b r) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        U: Tensor,
        core: Tensor,
        V: Tensor,
        scale: float,
        noise: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)  # first, to refuse an x of another width by the weight's shape
        h_0, h = read(rows, U, core, noise)
        expand_(h, V.to(x.dtype), scale, onto=y)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, U, core, V, noise, h_0, h)
        # Autograd refuses to write into a view that a function made, as `y += x` does. This one is no view to it, which
        # is safe, since nothing else looks at that memory.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, U, core, V, noise, h_0, h = ctx.saved_tensors
        needs_x, _, needs_bias, needs_U, needs_core, needs_V, *_ = ctx.needs_input_grad
        dx = dbias = dU = dcore = dV = None
        with without_autocast(x):
            g, rows = grads[0].reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
            if torch.is_grad_enabled():  # second derivatives go through these
                h_0, h = read(rows, U, core, noise)
            if needs_bias:
                dbias = g.sum(0)
            if needs_V:
                dV = ctx.scale * sum_of_products(g, h, V)
            dh = blockwise(g, V.to(x.dtype))
            if noise is not None:
                dh = dh * noise
            if needs_core:
                dcore = ctx.scale * (h_0.t() @ dh).to(core.dtype)
            dh_0 = dh @ core.to(x.dtype).t()
            if needs_U:
                dU = ctx.scale * sum_of_products(rows, dh_0, U)
            if needs_x:
                dx = expand_(dh_0, U.to(x.dtype), ctx.scale, onto=g @ weight).view(x.shape)
        return dx, None, dbias, dU, dcore, dV, None, None


def read(rows: Tensor, U: Tensor, core: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_0 and h."""
    h_0 = blockwise(rows, U.to(rows.dtype))
    h = h_0 @ core.to(rows.dtype)
    return h_0, h if noise is None else h * noise


def sum_of_products(wide: Tensor, narrow: Tensor, factor: Tensor) -> Tensor:
    """A factor's gradient (p, r) but for s: `wide` (rows, n p) times `narrow` (rows, n r), over rows and blocks."""
    width, rank = factor.shape
    # Transposed, which is the faster of the two orders for so few columns.
    return (narrow.reshape(-1, rank).t() @ wide.reshape(-1, width)).t().to(factor.dtype)
