"""One adapter per image: every image comes out as if it had been alone with its adapter.

In float64, where rounding cannot hide a wrong image; the precisions people use come on their own.
"""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import BACKBONES, NUM_LABELS, holdings, images, logits, make_backbone, to_int8
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import MobileViTConfig, MobileViTForImageClassification
from transformers.pytorch_utils import Conv1D

from fact_peft import FacTConfig, FacTLinear, convert_to_lora
from fact_peft.architecture.linears import OpenAttention
from fact_peft.method.fused_linear import FactorBank, read_per_image, write_per_image
from fact_peft.tuner.head import FacTHead

# From rank, decomposition and scale to the layers: no two are of one shape.
ADAPTERS = {
    "default": {"rank": 4},
    "tucker": {"rank": 3, "decomposition": "tk", "scale": 2.0},
    "headless": {"rank": 2, "scale": -0.5, "modules_to_save": []},
    "one layer": {"rank": 5, "modules_to_save": []},
}
NAMES = ["tucker", "__base__", "default", "headless", "one layer", "default"]


def with_adapters(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model` with all of `ADAPTERS`, every number of them random."""
    torch.manual_seed(0)
    model = model.to(dtype).eval()
    for name, settings in ADAPTERS.items():
        if name == "one layer":
            layers = [n for n, layer in model.get_base_model().named_modules() if isinstance(layer, FacTLinear)]
            settings = {**settings, "target_modules": [layers[len(layers) // 2]]}
        config = FacTConfig(**{"init_weights": False, "rank": 4, **settings})
        if name == "default":
            model = get_peft_model(model, config)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or ".fact_" in name:
            parameter.data.normal_(std=0.3)
    return model.to(dtype).eval()


def alone(model: nn.Module, name: str, call) -> list[Tensor]:
    """All tensors that come out of `call` under one adapter."""
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return tree_leaves(call())
        active = model.active_adapters
        model.base_model.set_adapter(name)
        outputs = tree_leaves(call())
        model.base_model.set_adapter(active)
        return outputs


def check(model: nn.Module, inputs: dict[str, Tensor], names: list[str], **tolerance: float) -> None:
    """Compare a mixed batch with each of its images alone."""
    with torch.no_grad():
        together = tree_leaves(model(**inputs, adapter_names=names))
    compared = 0
    for image, name in enumerate(names):
        one = {key: value[image : image + 1] for key, value in inputs.items()}
        apart = alone(model, name, partial(model, **one))
        for mixed, expected in zip(together, apart, strict=True):
            if isinstance(expected, Tensor) and mixed.shape == (len(names), *expected.shape[1:]):
                torch.testing.assert_close(mixed[image : image + 1], expected, **tolerance, msg=f"{image} {name}")
                compared += 1
    assert compared >= len(names)


# Everywhere


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture(architecture):
    torch.manual_seed(0)
    model = with_adapters(architecture.build())
    batches = [architecture.inputs() for _ in range(3)]
    inputs = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    if any(isinstance(module, OpenAttention) for module in model.modules()):
        # One function takes all its weights, with the tokens before the images.
        with pytest.raises(NotImplementedError, match=r"multi_head_attention_forward\(\) cannot use it"):
            model(**inputs, adapter_names=NAMES)
        for name in ADAPTERS:
            together = model(**inputs, adapter_names=[name] * len(NAMES))
            torch.testing.assert_close(tree_leaves(together), alone(model, name, partial(model, **inputs)))
    else:
        check(model, inputs, NAMES)


def torchvision_swin(block, downsample_layer):
    swin = pytest.importorskip("torchvision").models.swin_transformer
    return swin.SwinTransformer(
        [4, 4],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        num_classes=3,
        stochastic_depth_prob=0.0,
        block=getattr(swin, block),
        downsample_layer=getattr(swin, downsample_layer),
    )


# MobileViT folds the pixels of a patch into the batch; the others read the weights of qkv, or of qkv and proj.
OTHERS = {
    "MobileViT": lambda: MobileViTForImageClassification(
        MobileViTConfig(image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32])
    ),
    "timm BEiT": lambda: pytest.importorskip("timm").create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
    ),
    "torchvision Swin": lambda: torchvision_swin("SwinTransformerBlock", "PatchMerging"),
    "torchvision Swin v2": lambda: torchvision_swin("SwinTransformerBlockV2", "PatchMergingV2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_fold_or_read_weights(name):
    torch.manual_seed(0)
    model = OTHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = with_adapters(model)
    size = 32 if name == "timm BEiT" else 64
    pixels = torch.randn(len(NAMES), 3, size, size, dtype=torch.float64)
    check(model, {"pixel_values" if name == "MobileViT" else "x": pixels}, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_precisions(backbone, dtype):
    model = with_adapters(make_backbone(backbone), dtype)
    key = "x" if backbone == "timm" else "pixel_values"
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.15}
    check(model, {key: images(dtype, len(NAMES))}, NAMES, **tolerance)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            check(model, {key: images(dtype, len(NAMES))}, NAMES, rtol=0, atol=0.15)


def test_quantised_base():
    model = make_backbone("vit")
    to_int8(model, lambda module, name: isinstance(module, nn.Linear) and "vit." in name)
    model = with_adapters(model, torch.float32)
    check(model, {"pixel_values": images(count=len(NAMES))}, NAMES, rtol=0, atol=1e-3)


@pytest.mark.parametrize("names", [["default"] * 3, ["__base__"] * 3, ["tucker", "default", "tucker"]])
def test_few_adapters(names):
    check(with_adapters(make_backbone("vit")), {"pixel_values": images(torch.float64)}, names)


def test_inference_mode_and_gradients():
    model = with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, len(NAMES))
    expected = torch.stack(
        [alone(model, name, partial(model, pixel_values=pixels[i : i + 1]))[0][0] for i, name in enumerate(NAMES)]
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values=pixels, adapter_names=NAMES).logits, expected)
    differentiable = model(pixel_values=pixels, adapter_names=NAMES).logits
    torch.testing.assert_close(differentiable, expected)
    trained = {n: p for n, p in model.named_parameters() if ".fact_" in n}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    together = torch.autograd.grad(
        model(pixel_values=pixels, adapter_names=NAMES).logits.square().sum(), trained.values(), allow_unused=True
    )
    apart = {n: torch.zeros_like(p) for n, p in trained.items()}
    for i, name in enumerate(NAMES):
        if name == "__base__":
            continue
        model.base_model.set_adapter(name, inference_mode=False)
        mine = {n: p for n, p in trained.items() if n.endswith(f".{name}")}
        loss = model(pixel_values=pixels[i : i + 1]).logits.square().sum()
        for n, gradient in zip(mine, torch.autograd.grad(loss, mine.values()), strict=True):
            apart[n] += gradient
    for (n, expected_gradient), gradient in zip(apart.items(), together, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(expected_gradient) if gradient is None else gradient, expected_gradient, msg=n
        )


# The formula


@pytest.mark.parametrize("blocks", [(1, 1), (1, 3), (2, 1)])
def test_the_formula(blocks):
    """Against one product per image with dW written out by tensor names."""
    torch.manual_seed(0)
    (a, b), d, e, N = blocks, 6, 5, 8
    adapters, scales = [], [0.5, 2.0, 1.0]
    for rank in (2, 3):
        adapters.append((torch.randn(d, rank), torch.randn(N - rank, rank, rank), torch.randn(e, rank)))
    adapters.append(None)
    adapters, x = [t and tuple(f.double() for f in t) for t in adapters], torch.randn(4, 7, a * d).double()
    banks = [
        FactorBank.empty(1) if t is None else FactorBank(t[0][None], scale * t[1][None], t[2][None])
        for t, scale in zip(adapters, scales, strict=True)
    ]
    onto, owners = torch.randn(4, 7, b * e).double(), [1, 0, 2, 1]
    factors = FactorBank.join(banks, N).of_images(owners)
    h = read_per_image(x, factors.U)
    y = write_per_image(h, factors.cores[:, 1 : 1 + a * b].unflatten(1, (a, b)), factors.V, onto)
    for i, owner in enumerate(owners):
        expected = onto[i]
        if adapters[owner] is not None:
            U, cores, V = adapters[owner]
            slices = cores[1 : 1 + a * b].unflatten(0, (a, b))
            dW = scales[owner] * torch.einsum("dr,abrs,es->adbe", U, slices, V).reshape(a * d, b * e)
            expected = expected + x[i] @ dW
        torch.testing.assert_close(y[i], expected)
    copied = onto.clone()
    assert write_per_image(h, factors.cores[:, 1 : 1 + a * b].unflatten(1, (a, b)), factors.V, copied, True) is copied
    torch.testing.assert_close(copied, y)


# Heads


def test_heads_of_different_sizes_give_a_list():
    model = make_backbone("vit")
    model = with_adapters(model)
    head = model.get_base_model().classifier
    head.modules_to_save["tucker"] = nn.Linear(32, 7).double()
    pixels = images(torch.float64, len(NAMES))
    with torch.no_grad():
        output = model(pixel_values=pixels, adapter_names=NAMES)
    assert output.loss is None and isinstance(output.logits, list)
    assert [len(scores) for scores in output.logits] == [7 if name == "tucker" else NUM_LABELS for name in NAMES]
    for i, name in enumerate(NAMES):
        expected = alone(model, name, partial(model, pixel_values=pixels[i : i + 1]))
        torch.testing.assert_close(output.logits[i], expected[0][0])
    with pytest.raises(ValueError, match=r"labels .* different numbers of classes"):
        model(pixel_values=pixels, adapter_names=NAMES, labels=torch.zeros(len(NAMES), dtype=torch.long))


def test_heads_that_are_no_single_linear_layer():
    model = make_backbone("vit")
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, NUM_LABELS))
    check(with_adapters(model), {"pixel_values": images(torch.float64, len(NAMES))}, NAMES)


def test_heads_stay_what_peft_knows():
    model = with_adapters(make_backbone("vit"))
    heads = [module for module in model.modules() if isinstance(module, FacTHead)]
    assert len(heads) == 1
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(copied, {"pixel_values": images(torch.float64, len(NAMES))}, NAMES)


# Refusals


def test_what_is_refused():
    model = with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, 4)
    cases = [
        (["default"] * 2, r"has 2 names for a batch of 4 \(pixel_values\); pass one per image"),
        ([], r"adapter_names=\[\] names no adapter"),
        ("default", "is not a list of strings"),
        ([0, 1, 2, 3], "is not a list of strings"),
        (["default", "typo", "default", "tucker"], r"names \['typo'\], but there are only \['__base__', 'default'"),
    ]
    for names, message in cases:
        with pytest.raises(ValueError, match=message):
            model(pixel_values=pixels, adapter_names=names)
    with pytest.raises(ValueError, match="has 2 names for a batch of 4"):
        model(pixels, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="evaluation mode only"):
        model.train()(pixel_values=pixels, adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="while adapters are merged"):
        model(pixel_values=pixels, adapter_names=["default"] * 4)
    model.unmerge_adapter()
    check(model, {"pixel_values": images(torch.float64, len(NAMES))}, NAMES)


class Reader(nn.Module):
    """A model that reads a weight and uses it for something else than ``linear``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.dtype_seen = None

    def forward(self, x):
        self.dtype_seen = self.layer.weight.dtype, self.layer.weight.shape, self.layer.weight.device
        return x @ self.layer.weight.t()


def test_a_weight_that_is_not_multiplied_by_linear_is_refused():
    model = get_peft_model(Reader(), FacTConfig(rank=2, target_modules=["layer"], init_weights=False)).eval()
    x = torch.randn(2, 3, 6)
    with pytest.raises(NotImplementedError, match=r"another matrix for every image, and t\(\) cannot use it"):
        model(x, adapter_names=["default", "__base__"])
    assert model.get_base_model().dtype_seen == (torch.float32, torch.Size([6, 6]), torch.device("cpu"))
    torch.testing.assert_close(model(x, adapter_names=["default"] * 2), model(x))
    with model.disable_adapter():
        expected = model(x)
    torch.testing.assert_close(model(x, adapter_names=["__base__"] * 2), expected)


def test_a_weight_that_is_kept_the_other_way_round_is_refused_too():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Conv1D(6, 6)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    model = get_peft_model(Transposed(), FacTConfig(rank=2, target_modules=["layer"], init_weights=False)).eval()
    x = torch.randn(2, 3, 6)
    with pytest.raises(NotImplementedError, match=r"linear\(\) cannot use it"):
        model(x, adapter_names=["default", "__base__"])
    assert not torch.equal(model(x, adapter_names=["default"] * 2), model(x, adapter_names=["__base__"] * 2))


# A call's adapters are the call's


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_threads_do_not_see_each_others_adapters(backbone):
    model = with_adapters(make_backbone(backbone))
    pixels = images(torch.float64, 3)
    choices = [["default"] * 3, ["tucker"] * 3, ["__base__", "tucker", "default"], ["headless", "default", "__base__"]]
    with torch.no_grad():
        expected = [model(pixel_values=pixels, adapter_names=names).logits for names in choices]
        expected.append(model(pixel_values=pixels).logits)
    choices.append(None)
    wrong, start = [], threading.Barrier(8)

    def work(seed):
        start.wait()
        for k in range(20):
            which = (seed + k) % len(choices)
            with torch.no_grad():
                result = model(pixel_values=pixels, adapter_names=choices[which]).logits
            if not torch.allclose(result, expected[which]):
                wrong.append((seed, k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_that_fails_leaves_nothing_behind():
    model = with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, 3)
    expected, held = logits(model, pixels), holdings(model)
    with pytest.raises(ValueError, match="Input image size"):
        model(pixel_values=pixels[..., 1:], adapter_names=["tucker"] * 3)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=0, atol=0)
    assert holdings(model) == held


def test_a_model_inside_another_has_its_own_adapters():
    teacher, student = with_adapters(make_backbone("vit")), with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, 3)
    asked = {"plain": None, "mixed": ["__base__", "tucker", "default"]}
    expected = {key: teacher(pixel_values=pixels, adapter_names=names).logits for key, names in asked.items()}
    names = ["default", "headless", "tucker"]
    alone_logits = student(pixel_values=pixels, adapter_names=names).logits
    seen = {}

    def ask_the_teacher(module, args):
        for key, inner in asked.items():
            seen[key] = teacher(pixel_values=pixels, adapter_names=inner).logits
        seen["bare"] = teacher.get_base_model()(pixel_values=pixels).logits  # which nobody tells about adapters

    student.get_base_model().vit.register_forward_pre_hook(ask_the_teacher)
    torch.testing.assert_close(student(pixel_values=pixels, adapter_names=names).logits, alone_logits)
    expected["bare"] = expected["plain"]
    for key in expected:
        torch.testing.assert_close(seen[key], expected[key])


def test_a_model_called_inside_itself_has_the_active_adapter_again():
    model = with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, 3)
    names = ["__base__", "headless", "tucker"]
    plain, mixed = model(pixel_values=pixels).logits, model(pixel_values=pixels, adapter_names=names).logits
    seen = []

    def ask_itself(module, args):
        if not seen:
            seen.append(None)
            seen.append(model(pixel_values=pixels).logits)

    model.get_base_model().vit.register_forward_pre_hook(ask_itself)
    torch.testing.assert_close(model(pixel_values=pixels, adapter_names=names).logits, mixed)
    torch.testing.assert_close(seen[1], plain)


def test_a_layer_that_reads_the_same_tensor_after_it_was_written_to_reads_it_anew():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x * 1.0
            q = self.q(x)
            return q + self.k(x.add_(1.0))

    torch.manual_seed(0)
    model = get_peft_model(InPlace(), FacTConfig(rank=2, target_modules=["q", "k"], init_weights=False)).eval()
    x = torch.randn(2, 3, 6)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            mixed = model(x, adapter_names=["default", "__base__"])
            torch.testing.assert_close(mixed[0], model(x)[0])


def test_compiled_models_take_names_too():
    model = with_adapters(make_backbone("vit"))
    pixels = images(torch.float64, 3)
    names = ["default", "tucker", "__base__"]
    with torch.no_grad():
        expected = model(pixel_values=pixels, adapter_names=names).logits
        plain = model(pixel_values=pixels).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(pixel_values=pixels).logits, plain)
        torch.testing.assert_close(compiled(pixel_values=pixels, adapter_names=names).logits, expected)
        torch.testing.assert_close(compiled(pixel_values=pixels).logits, plain)


def test_lora_agrees_on_what_the_verb_means():
    """PEFT's own method, with the increments of a FacT adapter: the same rows."""
    fact = get_peft_model(make_backbone("vit"), FacTConfig(rank=4, init_weights=False)).eval()
    lora_config, state = convert_to_lora(fact)
    lora = get_peft_model(make_backbone("vit"), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        torch.testing.assert_close(
            fact(pixel_values=images(), adapter_names=names).logits,
            lora(pixel_values=images(), adapter_names=names).logits,
            rtol=0,
            atol=1e-5,
        )
