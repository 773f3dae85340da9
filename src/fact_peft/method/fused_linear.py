r"""A frozen linear layer and its increments, computed together in few passes over the activations.

One adapter for all rows is one differentiable function, `FusedLinear`:

    h_0 = x (I (x) U)                   reads the input
    h = h_0 Core
    y = x W^T + b + s h (I (x) V)^T     writes the output

Written as separate operations, the last term of y would go through a fresh tensor, and so would the sum of the two
gradients of x. Here both are added in place, to a tensor that nothing else refers to. With g the gradient of y,

    dh = g (I (x) V)        dh_0 = dh Core^T        dx = g W + s dh_0 (I (x) U)^T
    dV = s g^T h            dCore = s h_0^T dh      dU = s x^T dh_0

where dh and dh_0 lack the factor s, and the sums over rows in dU and dV also run over the blocks. Dropout multiplies h
and dh by the same noise. The scale s comes last, in the precision of the factors, because a gradient times 100 would
often overflow float16.

With factors of its own for every image i,

    h_i = x_i (I (x) U_i)                             one batched product for all layers of a stack that read x
    y_i = x_i W^T + b + h_i Core_i (I (x) V_i)^T      two more, the last one with the addition

where Core_i includes the scale s_i. The adapters of a batch are padded to one rank with columns of zeros, which change
no product. A slice that an adapter does not have has a core of zeros, and so has every slice of an image without
adapter.

Letters as in `decomposition.py`; B images, M rows (tokens) per image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import linear as linear_module
from torch.nn.modules import module as module_module

from .decomposition import blockwise, core_matrix, expand_, low_rank_pair
from .tensorization import Slices

Layer = TypeVar("Layer", bound=Hashable)
# The methods that make up a call of an nn.Linear, and the globals of torch's own functions. A patch has others, also if
# it was made before this import or with `functools.wraps`.
GLOBALS = (("forward", vars(linear_module)), ("__call__", vars(module_module)), ("_call_impl", vars(module_module)))


def is_fusable(base_layer: nn.Module) -> bool:
    """Whether `base_layer` can be computed from its weight and bias without calling it.

    It cannot if something takes part in the call: hooks, with which ZeRO-3 and CPU offloading bring the weight; a
    subclass, as quantisation and FSDP make; or whatever takes part in every call, see `calls_are_watched`. It cannot if
    the weight is trained, sharded, or no plain tensor, nor while the call is compiled, traced or transformed: a
    compiler fuses better, and forward-mode differentiation and `torch.func` need plain operations.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(base_layer) is not nn.Linear:
        return False
    if calls_are_watched():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    has_hooks = (
        base_layer._forward_pre_hooks
        or base_layer._forward_hooks
        or base_layer._backward_pre_hooks
        or base_layer._backward_hooks
    )
    if has_hooks or "forward" in vars(base_layer):
        return False
    weight = base_layer.weight
    shape = (base_layer.out_features, base_layer.in_features)
    trained = weight.requires_grad and torch.is_grad_enabled()
    return not trained and weight.shape == shape and type(weight.data) is Tensor


def calls_are_watched() -> bool:
    """Whether hooks for all modules or a patched method take part in every call of an ``nn.Linear``."""
    return module_module._has_any_global_hook() or any(
        getattr(getattr(nn.Linear, name), "__globals__", None) is not home for name, home in GLOBALS
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would now cast `x` for a product; None if it would not cast it."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of `x`."""
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
    """y of `FusedLinear`. Without gradients and with many rows, the increment is added to the weight first."""
    # Writing W + dW costs less than reading x and writing y once more if it is smaller than both. In half precision the
    # sum would lose digits of dW.
    worthwhile = weight.numel() <= x.shape[:-1].numel() * sum(weight.shape)
    if torch.is_grad_enabled() or noise is not None or not worthwhile or weight.dtype.itemsize < 4:
        return FusedLinear.apply(x, weight, bias, U, core, V, scale, noise)
    A, B = low_rank_pair(U, core, V, scale)
    return nn.functional.linear(x, torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype)), bias)


class FusedLinear(torch.autograd.Function):
    """``apply(x, weight, bias, U, core, V, scale, noise)`` is y, see above.

    x (..., a d), weight (b e, a d) and bias (b e) or None have one dtype, in which everything is multiplied. The others
    are U (d, r), core (a r, b r), V (e, r), a float scale, and noise (rows of x, b r) or None.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, U, core, V, scale, noise = args
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)  # first, so that an x of another width is refused by the weight
        h_0, h = read(rows, U, core, noise)
        expand_(h, V.to(x.dtype), scale, onto=y)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, U, core, V, noise, h_0, h)
        # Autograd refuses to write into a view that a function returned, as `y += x` does. To autograd this is no view,
        # which is safe because nothing else refers to the memory.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, U, core, V, noise, h_0, h = ctx.saved_tensors
        needs_x, _, needs_bias, needs_U, needs_core, needs_V, *_ = ctx.needs_input_grad
        dx = dbias = dU = dcore = dV = None
        with without_autocast(x):
            g, rows = grads[0].reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
            if torch.is_grad_enabled():  # for second derivatives, h_0 and h must depend on the inputs
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
    """h_0 and h of `rows` (n, a d)."""
    h_0 = blockwise(rows, U.to(rows.dtype))
    h = h_0 @ core.to(rows.dtype)
    return h_0, h if noise is None else h * noise


def sum_of_products(wide: Tensor, narrow: Tensor, factor: Tensor) -> Tensor:
    """wide^T narrow (p, r), summed over rows and blocks, where `factor` is (p, r): its gradient without s."""
    width, rank = factor.shape
    # Computed transposed, which is faster for so few columns.
    return (narrow.reshape(-1, rank).t() @ wide.reshape(-1, width)).t().to(factor.dtype)


@dataclass(frozen=True)
class FactorBank:
    """The factors of several adapters, or of every image of a batch, in one stack of slices."""

    U: Tensor  # (n, d, r)
    cores: Tensor  # (n, N, r, r), scales included
    V: Tensor  # (n, e, r)

    @classmethod
    def empty(cls, n: int) -> FactorBank:
        """Factors of rank zero, for `n` images without adapter."""
        return cls(torch.zeros(n, 0, 0), torch.zeros(n, 0, 0, 0), torch.zeros(n, 0, 0))

    @classmethod
    def join(cls, banks: Sequence[FactorBank], num_slices: int, rank: int = 0) -> FactorBank:
        """One bank of the adapters of all `banks`, with `num_slices` slices and a rank of at least `rank`."""
        U, cores, V = zip(*((bank.U, bank.cores, bank.V) for bank in banks), strict=True)
        return cls(joined(U, 0, rank), joined(cores, num_slices, rank, rank), joined(V, 0, rank))

    def to(self, device: torch.device, dtype: torch.dtype) -> FactorBank:
        return FactorBank(*(factor.to(device, dtype) for factor in (self.U, self.cores, self.V)))

    def of_images(self, places: Sequence[int]) -> FactorBank:
        """The factors of every image, where `places` are the indices of the images' adapters in this bank."""
        return FactorBank(*(of_images(factor, places) for factor in (self.U, self.cores, self.V)))


def joined(tensors: Sequence[Tensor], *least: int) -> Tensor:
    """Concatenate tensors (n, ...), padded with zeros to their largest sizes and at least to the sizes `least`.

    Empty tensors are moved to the device and dtype of the others.
    """
    sizes = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in tensors), least, strict=True)]
    like = next(tensor for tensor in tensors if tensor.numel())
    padded = []
    for tensor in tensors:
        missing = [size - side for side, size in zip(tensor.shape[1:], sizes, strict=True)]
        padding = [amount for side in reversed(missing) for amount in (0, side)]
        tensor = tensor if tensor.numel() else tensor.to(like)
        padded.append(nn.functional.pad(tensor, padding) if any(missing) else tensor)
    return torch.cat(padded)


def of_images(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """The entries of `tensor` (n, ...) at `places`, one for every image."""
    in_order = list(places) == list(range(len(tensor)))
    return tensor if in_order else tensor.index_select(0, torch.tensor(places, device=tensor.device))


def reordered(cores: Tensor, theirs: Mapping[Layer, Slices], ours: Mapping[Layer, Slices]) -> Tensor:
    """Rearrange cores (n, N, r, r) of a stack from the slices `theirs` to the slices `ours`, both by layer.

    `ours` may have more layers, and all parts of a layer of which `theirs` has some; their cores are zero.
    """
    absent = cores.shape[1]
    order: list[int] = []
    for layer, owned in ours.items():
        its = theirs.get(layer)
        if its is None:
            order += [absent] * owned.count
        elif its.parts == owned.parts:
            order += range(its.first, its.first + its.count)
        else:
            order += [absent if place is None else place for place in its.places]
    if order[:absent] == list(range(absent)):
        return cores
    with_absent = nn.functional.pad(cores, (0, 0, 0, 0, 0, 1))
    return with_absent.index_select(1, torch.tensor(order, device=cores.device))


def read_per_image(x: Tensor, U: Tensor) -> Tensor:
    """x_i (I_a (x) U_i) for every image: from (B, M, a d) with U (B, d, r) to (B, M, a r)."""
    num_images, width, rank = U.shape
    h = torch.bmm(x.reshape(num_images, -1, width), U)
    return h.view(num_images, x.shape[1], x.shape[2] // width * rank)


def write_per_image(h: Tensor, cores: Tensor, V: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
    """onto_i + h_i Core_i (I_b (x) V_i)^T for every image, where h is what `read_per_image` returns.

    From h (B, M, a r), cores (B, a, b, r, r) and V (B, e, r) to `onto` (B, M, b e), contiguous if written `in_place`.
    """
    num_images, out_width, rank = V.shape
    h = torch.bmm(h, core_matrix(cores)).view(num_images, -1, rank).to(onto.dtype)
    rows = onto.reshape(num_images, -1, out_width)
    V = V.to(onto.dtype).mT
    if in_place:
        rows.baddbmm_(h, V)
        return onto
    return torch.baddbmm(rows, h, V).view(onto.shape)


def linear_per_image(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x_i W_i^T + b_i for every image: from (B, M, in) with W (B, out, in) and b (B, out) to (B, M, out)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype).mT
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.to(dtype)[:, None], x, weight)
