"""An adapted layer in the hands of code that was written for ``nn.Linear``: what that code may do, it still may.

LoRA passes all of these. The fused layer is compared with the plain path, which a hook on the frozen layer keeps it on.
"""

import copy
import functools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fact_peft import FacTConfig
from fact_peft.method.decomposition import DECOMPOSITIONS


def adapted_linear(shape=(8, 8), then=None, **settings):
    """A linear layer with an adapter, followed by `then`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape), then or nn.Identity())
    return get_peft_model(model, FacTConfig(rank=2, target_modules=["0"], init_weights=False, **settings))


def on_plain_path(model):
    plain = copy.deepcopy(model)
    plain.get_submodule("base_model.model.0.base_layer").register_forward_hook(lambda *_: None)
    return plain


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


class InPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, y):
        self.change(y)
        return y


IN_PLACE = {
    "+=": lambda y: y.add_(torch.ones(8)),
    "relu": nn.ReLU(inplace=True),
    "a column": lambda y: y[..., 0].zero_(),
    "rows": lambda y: y.view(-1, 8)[:2].mul_(3.0),
}


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_output_may_be_changed_in_place(change, shape):
    model = adapted_linear(then=InPlace(change)).train()
    x = torch.randn(shape)
    ours, plain = (output_and_gradients(m, x) for m in (model, on_plain_path(model)))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("widths", [(8, 8), (8, 24), (16, 8)])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 0)])
def test_empty_input_gives_empty_output_and_zero_gradients(shape, widths, decomposition, dropout):
    model = adapted_linear(widths, decomposition=decomposition, fact_dropout=dropout).train()
    for m in (model, on_plain_path(model)):
        output, dx, *gradients = output_and_gradients(m, torch.randn(*shape, widths[0]))
        assert output.shape == (*shape, widths[1]) and dx.shape == (*shape, widths[0])
        assert gradients and not any(map(torch.any, gradients))
        with torch.no_grad():
            assert m(torch.randn(*shape, widths[0])).shape == (*shape, widths[1])


@pytest.mark.parametrize("shape", [(2, 7), (2, 16), (2, 4), (3,), (2, 3, 5)])
def test_input_of_another_width_is_refused_by_the_shape_of_the_layer(shape):
    model = adapted_linear()
    for call in (model, torch.no_grad()(model)):
        with pytest.raises(RuntimeError, match=rf"shapes cannot be multiplied \(\d+x{shape[-1]} and 8x8\)"):
            call(torch.randn(shape))


GLOBAL_HOOKS = [
    torch.nn.modules.module.register_module_forward_pre_hook,
    torch.nn.modules.module.register_module_forward_hook,
    torch.nn.modules.module.register_module_full_backward_pre_hook,
    torch.nn.modules.module.register_module_full_backward_hook,
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_for_all_modules_see_the_frozen_layer(register):
    model = adapted_linear()
    frozen, seen = model.get_submodule("base_model.model.0.base_layer"), []
    hook = register(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    finally:
        hook.remove()
    assert any(module is frozen for module in seen)


@pytest.mark.parametrize("cls, method", [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Module, "__call__")])
def test_a_patched_class_sees_the_frozen_layer(cls, method, monkeypatch):
    model = adapted_linear()
    frozen, seen = model.get_submodule("base_model.model.0.base_layer"), []
    original = getattr(cls, method)

    @functools.wraps(original)
    def patched(self, *args):
        seen.append(self)
        return original(self, *args)

    monkeypatch.setattr(cls, method, patched)
    model(torch.randn(2, 8))
    assert any(module is frozen for module in seen)


def test_the_place_to_write_a_weight_to_is_the_base_layer():
    model, x = adapted_linear(), torch.randn(2, 8)
    layer = model.get_submodule("base_model.model.0")
    expected = model(x)
    with torch.no_grad():
        layer.weight.mul_(2)  # lost, as docs/features.md says
        assert torch.equal(model(x), expected)
        difference = nn.functional.linear(x, layer.base_layer.weight)
        layer.base_layer.weight.mul_(2)
    torch.testing.assert_close(model(x), expected + difference)


def test_a_sequential_inside_the_adapted_model_keeps_its_own_children():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

        def forward(self, x):
            return self.layers(x)

    holder = Holder()
    get_peft_model(holder, FacTConfig(rank=2, target_modules=["0"], init_weights=False))
    assert len(holder.layers) == 2 and len(holder.layers[:-1]) == 1
    x = torch.randn(2, 8)
    torch.testing.assert_close(holder.layers[-1](holder.layers[:-1](x)), holder(x))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_what_one_may_do_while_merged(decomposition, tmp_path):
    model, x = adapted_linear(decomposition=decomposition), torch.randn(2, 8)
    expected = model(x)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(model.train()(x), expected)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    model.save_pretrained(tmp_path)
    for other in (model, twin, PeftModel.from_pretrained(adapted_linear().unload(), tmp_path)):
        torch.testing.assert_close(other(x), expected)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_weighted_adapter(["default"], [2.0], "twice")
    torch.testing.assert_close(model(x), expected)
    model.set_adapter("twice")
    torch.testing.assert_close(model(x), base + 2 * (expected - base))
