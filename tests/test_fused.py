"""The fused layer: compared with finite differences, and with the plain path, which test_equations.py compares with the
paper. A forward hook on the frozen layers that does nothing keeps a model on the plain path.
"""

import copy
import functools
import math
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from backbones import images, logits, make_backbone
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from fact_peft import FacTConfig, FacTLinear
from fact_peft.method.decomposition import DECOMPOSITIONS, contract, expand
from fact_peft.method.fused_linear import FusedLinear, is_fusable

# A different order of the same sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# Under autocast the scale meets the core before rounding to bfloat16 (0.4 %), not after, and sums are rounded less.
TOLERANCE_AUTOCAST = 4e-2


def adapted(backbone="vit", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = FacTConfig(**{"rank": 4, "init_weights": False, "scale": 3.0, **settings})
    return get_peft_model(make_backbone(backbone, dtype), config, autocast_adapter_dtype=dtype != torch.float64)


def frozen_layers(model):
    return [layer.base_layer for layer in model.modules() if isinstance(layer, FacTLinear)]


def outputs_and_gradients(model, dtype, autocast=False):
    torch.manual_seed(5)  # of the dropout
    pixels = images(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = logits(model, pixels)
    nn.functional.cross_entropy(scores.double(), torch.arange(3)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"scores": scores.detach(), "pixels": pixels.grad, **gradients}


def on_plain_path(model):
    plain = copy.deepcopy(model)
    for layer in frozen_layers(plain):
        layer.register_forward_hook(lambda *_: None)
    assert all(map(is_fusable, frozen_layers(model))) and not any(map(is_fusable, frozen_layers(plain)))
    return plain


def assert_paths_agree(model, dtype=torch.float32, autocast=False):
    ours, theirs = (outputs_and_gradients(m, dtype, autocast) for m in (model, on_plain_path(model)))
    largest = max(value.abs().max() for value in theirs.values())
    for name, value in theirs.items():
        # A key's bias has the gradient zero, of which either path computes rounding only.
        error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3 * largest)
        assert error < (TOLERANCE_AUTOCAST if autocast else TOLERANCE[dtype]), (name, error)


@pytest.mark.parametrize("num_in_blocks, num_out_blocks", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
def test_derivatives_match_finite_differences(num_in_blocks, num_out_blocks, bias, dropout):
    torch.manual_seed(0)
    random = functools.partial(torch.randn, dtype=torch.float64)
    in_width, out_width, rank = 3, 4, 2
    x = random(3, 2, in_width * num_in_blocks).transpose(0, 1)  # not contiguous
    weight = random(out_width * num_out_blocks, in_width * num_in_blocks)
    b = random(len(weight)) if bias else None
    U, V = random(in_width, rank), random(out_width, rank)
    core = random(rank * num_in_blocks, rank * num_out_blocks)
    noise = torch.tensor([0.0, 2.0], dtype=torch.float64).repeat(6, num_out_blocks) if dropout else None

    def function(x, b, U, core, V):
        return FusedLinear.apply(x, weight, b, U, core, V, -1.5, noise)

    inputs = [None if value is None else value.requires_grad_() for value in (x, b, U, core, V)]
    h = contract(x, U, core)
    h = h if noise is None else h * noise.view(2, 3, -1)
    torch.testing.assert_close(function(*inputs), expand(h, V, -1.5, onto=nn.functional.linear(x, weight, b)))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("backbone", ["vit", "swin", "timm"])
def test_fused_equals_plain(backbone, decomposition, dtype):
    assert_paths_agree(adapted(backbone, dtype, decomposition=decomposition), dtype)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_fused_is_as_exact_as_plain_in_bfloat16(shape, decomposition):
    torch.manual_seed(0)
    config = FacTConfig(rank=4, decomposition=decomposition, target_modules=["0"], init_weights=False, scale=3.0)
    fused = get_peft_model(nn.Sequential(nn.Linear(*shape)).bfloat16(), config)
    plain = on_plain_path(fused)
    truth = copy.deepcopy(plain).double()
    x, g = torch.randn(256, shape[0], dtype=torch.bfloat16), torch.randn(256, shape[1], dtype=torch.bfloat16)

    def output_and_gradients(model, dtype):
        inputs = x.to(dtype, copy=True).requires_grad_()
        y = model(inputs)
        y.backward(g.to(dtype))
        factors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {"y": y.detach(), "x": inputs.grad, **factors}

    exact = output_and_gradients(truth, torch.float64)
    ours, theirs = (output_and_gradients(model, torch.bfloat16) for model in (fused, plain))
    for name, value in exact.items():
        errors = [(found[name].double() - value).norm().item() for found in (ours, theirs)]
        # Both round the same products, in another order; over so many entries that averages out.
        assert errors[0] < 1.25 * errors[1], (name, errors)


@pytest.mark.parametrize("backbone", ["vit", "timm"])
def test_dropout_draws_the_same_noise(backbone):
    model = adapted(backbone, fact_dropout=0.5).train()
    assert_paths_agree(model)
    first, second = (logits(model, images()) for _ in range(2))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(dropout):
    assert_paths_agree(adapted(fact_dropout=dropout).train(), autocast=True)


def test_backward_under_autocast_of_a_forward_without():
    model = adapted()
    expected = outputs_and_gradients(copy.deepcopy(model), torch.float32)
    loss = nn.functional.cross_entropy(logits(model, images()), torch.arange(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for name, parameter in model.named_parameters():
        if ".fact_" in name:
            error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
            assert error < TOLERANCE_AUTOCAST


def test_trained_biases():
    model = adapted(bias="all")
    assert any(p.requires_grad for name, p in model.named_parameters() if name.endswith("base_layer.bias"))
    assert_paths_agree(model)


def hooked_by_accelerate(layer):
    return add_hook_to_module(layer, ModelHook())


def with_forward_hook(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_forward_pre_hook(layer):
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def with_backward_hook(layer):
    layer.register_full_backward_hook(lambda *_: None)
    return layer


def trained(layer):
    return layer.requires_grad_(True)


def partitioned(layer):
    layer.weight.data = layer.weight.data.new_empty(0)
    return layer


def of_tensor_subclass(layer):
    class Sharded(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Sharded), requires_grad=False)
    return layer


def subclassed(layer):
    layer.__class__ = type("Sharded", (nn.Linear,), {})
    return layer


@pytest.mark.parametrize(
    "change",
    [
        hooked_by_accelerate,
        with_forward_hook,
        with_forward_pre_hook,
        with_backward_hook,
        trained,
        partitioned,
        of_tensor_subclass,
        subclassed,
        lambda layer: Conv1D(3, 2).requires_grad_(False),
    ],
)
def test_a_layer_that_must_be_called_is_not_fused(change):
    layer = nn.Linear(2, 3).requires_grad_(False)
    assert is_fusable(layer)
    assert not is_fusable(change(layer))


def test_a_weight_that_requires_gradients_is_fused_where_there_are_none():
    layer = nn.Linear(2, 3)
    assert not is_fusable(layer)
    with torch.no_grad():
        assert is_fusable(layer)


def count_fused(model, call):
    """How many adapted layers `call` computes without calling the frozen one."""
    called = set()

    def see(frame, event, argument):
        if event == "call" and frame.f_code is nn.Linear.forward.__code__:
            called.add(frame.f_locals["self"])

    sys.setprofile(see)  # a hook or a patch would keep the layers from being fused
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(set(frozen_layers(model)) - called)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention under jacrev
def test_which_calls_are_fused():
    model = adapted(modules_to_save=[]).eval()
    total = len(frozen_layers(model))
    assert total == 12

    def plain_forward():
        return logits(model, images())

    def functional():
        factors = {name: p.detach() for name, p in model.named_parameters() if ".fact_" in name}
        torch.func.jacrev(lambda f: torch.func.functional_call(model, f, (images(),)).logits.sum())(factors)

    def forward_mode():
        with torch.autograd.forward_ad.dual_level():
            plain_forward()

    assert count_fused(model, plain_forward) == total
    assert count_fused(model, torch.no_grad()(plain_forward)) == total
    assert count_fused(model, functional) == 0
    assert count_fused(model, forward_mode) == 0
    assert count_fused(model, lambda: model(images(), adapter_names=["default"] * 3)) == total
    assert count_fused(model, lambda: model(images(), adapter_names=["default", "__base__", "default"])) == 0
    with model.disable_adapter():
        assert count_fused(model, plain_forward) == 0
    model.add_adapter("other", FacTConfig(rank=2, init_weights=False, modules_to_save=[]))
    assert count_fused(model, plain_forward) == total
    model.base_model.set_adapter(["default", "other"])
    assert count_fused(model, plain_forward) == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")  # deprecated, and still how models are exported
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # a comparison of shapes
def test_jit_trace_holds_plain_operations():
    model = nn.Sequential(nn.Linear(6, 6))
    traced = get_peft_model(model, FacTConfig(rank=2, target_modules=["0"], init_weights=False)).base_model.model
    x = torch.randn(3, 6)
    graph = torch.jit.trace(traced, x, check_trace=False)
    assert "PythonOp" not in str(graph.inlined_graph)
    torch.testing.assert_close(graph(x), traced(x))


def count_additions_to_weights(monkeypatch, run):
    """What `run` returns, and how often it calls ``torch.addmm``, which the fused layer does to fold only."""
    calls = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append(args) or addmm(*args, **kwargs))
    result = run()
    monkeypatch.undo()
    return result, len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 4, 5])  # q_proj, fc1, fc2
def test_without_gradients_and_with_many_rows_the_increment_is_added_to_the_weight(index, dtype, monkeypatch):
    layer = [module for module in adapted(dtype=dtype).modules() if isinstance(module, FacTLinear)][index]
    enough_rows = math.ceil(layer.in_features * layer.out_features / (layer.in_features + layer.out_features))
    for num_rows in (enough_rows - 1, enough_rows):
        x = torch.randn(1, num_rows, layer.in_features, dtype=dtype)
        with torch.no_grad():
            result, num_folds = count_additions_to_weights(monkeypatch, lambda x=x: layer(x))
        # Rounding W + dW to bfloat16 would lose small increments.
        assert num_folds == (num_rows == enough_rows and dtype == torch.float32)
        plain = layer(x).detach()
        torch.testing.assert_close(result, plain, rtol=0, atol=2e-5 if dtype == torch.float32 else 0)


def saved_bytes(config, shape, x):
    """Bytes that autograd keeps for the backward pass of an adapted linear layer, parameters not counted."""
    model = get_peft_model(nn.Sequential(nn.Linear(*shape)), config)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_saves_its_input_as_lora_does_and_little_else(shape):
    rank, rows = 4, 100
    x = torch.randn(rows, shape[0], requires_grad=True)
    fact = saved_bytes(FacTConfig(rank=rank, target_modules=["0"]), shape, x)
    lora = saved_bytes(LoraConfig(r=rank, target_modules=["0"]), shape, x)
    # What is rank wide, once for each block of either side, and the scaled core.
    blocks = sum(shape) // min(shape)
    narrow = 4 * rows * rank * blocks + 4 * 4 * rank * rank
    assert 4 * x.numel() < fact <= 4 * x.numel() + narrow
    assert fact <= lora + narrow


@pytest.mark.parametrize("init_weights", [True, False, "orthogonal"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_large_scale_does_not_overflow_float16(decomposition, init_weights):
    torch.manual_seed(0)
    config = FacTConfig(
        rank=4, decomposition=decomposition, init_weights=init_weights, scale=100.0, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)
    exact = copy.deepcopy(model).double()
    x, g = torch.randn(256, 64).half(), 100 * torch.randn(256, 64).half()
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    y.backward(g)
    exact(x.double()).backward(g.double())
    largest = 0.0
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.requires_grad:
            # Some products of numbers rounded to 2^-11, of which much cancels.
            assert (ours.grad - theirs.grad).norm() <= 0.01 * theirs.grad.norm()
            largest = max(largest, theirs.grad.abs().max().item())
    assert largest > torch.finfo(torch.float16).max
