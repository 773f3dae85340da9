"""An image never meets the adapter of another one: what a model does with its rows is found out, or refused.

Compared with calls of one adapter at a time, in float64.
"""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from fact_peft import AdapterPool, FacTConfig, FacTLinear

WIDTH, TOKENS, LABELS = 8, 6, 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + self.fc2(self.fc1(x).tanh())


class ToyForClassification(nn.Module):
    """A transformer of tokens (images, tokens, width) whose rows go one of several ways."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(WIDTH, LABELS)
        self.way, self.calls = "plain", 0

    def get_classifier(self):
        return self.classifier

    def encode(self, x):
        for index, layer in enumerate(self.layers):
            if self.way == "frozen" and index == 0:
                with torch.no_grad():
                    x = layer(x)
            elif self.way in ("reentrant", "other"):
                x = checkpoint(layer, x, use_reentrant=self.way == "reentrant")
            else:
                x = layer(x)
        return x

    def forward(self, x):
        self.calls += 1
        if self.way == "mirrored":  # all images before all mirrored ones
            return self.classifier(self.encode(torch.cat([x, x.flip(1) * 0.5])).mean(1)).view(2, len(x), -1).mean(0)
        if self.way == "interleaved":  # every image before its mirrored one
            both = torch.stack([x, x.flip(1) * 0.5], 1).flatten(0, 1)
            return self.classifier(self.encode(both).mean(1)).view(len(x), 2, -1).mean(1)
        if self.way == "tokens first":
            for layer in self.layers:  # attention and all else over the second axis but one
                x = layer(x.transpose(0, 1).contiguous().transpose(0, 1)) + layer.fc2(
                    layer.fc1(x.transpose(0, 1).contiguous())
                ).transpose(0, 1)
            return self.classifier(x.mean(1))
        if self.way == "a loss":
            return self.encode(x).square().mean()
        return self.classifier(self.encode(x).mean(1))


NAMES = ["one", "two", "__base__", "two", "one", "three", "two", "one"]


def adapted(way, trained=False):
    torch.manual_seed(0)
    targets = {"target_modules": ["q", "k", "v", "fc1", "fc2"], "init_weights": False}
    model = get_peft_model(ToyForClassification(), FacTConfig(rank=2, **targets), "one")
    for name, settings in (("two", {"rank": 3}), ("three", {"rank": 1, "decomposition": "tk", "scale": -2.0})):
        model.add_adapter(name, FacTConfig(**targets, **settings))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_()
        parameter.requires_grad_(trained and (".fact_" in name or ".modules_to_save." in name))
    model.get_base_model().way = way
    return model.double().eval()


def images(count):
    return torch.randn(count, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def one_by_one(model, x, names):
    rows = []
    for image, name in zip(x.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(image))
        else:
            model.base_model.set_adapter(name, inference_mode=True)
            rows.append(model(image))
    return torch.cat(rows)


def pool_of(model):
    torch.manual_seed(0)
    plain = ToyForClassification().double().eval()
    plain.way = model.get_base_model().way
    pool = AdapterPool(plain)
    for name, config in model.peft_config.items():
        pool.load(name, (config, get_peft_model_state_dict(model, adapter_name=name)))
    return pool


@pytest.mark.parametrize("count", [2, 3, 6, 8])
@pytest.mark.parametrize("way", ["mirrored", "tokens first"])
@torch.no_grad()
def test_rows_that_are_not_together_are_refused(way, count):
    model, x, names = adapted(way), images(count), NAMES[:count]
    pool = pool_of(model)
    for call in (lambda: model(x, adapter_names=names), lambda: pool(x, names)):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"ToyForClassification cannot have one adapter per image|pass one name per image"
            ):
                call()
    # With one adapter for all there is nothing to mix up.
    expected = one_by_one(model, x, ["two"] * count)
    torch.testing.assert_close(model(x, adapter_names=["two"] * count), expected, **EXACT)
    (alone,) = pool(x[:1], ["two"])
    torch.testing.assert_close(alone.logits.double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 6, 8])
@pytest.mark.parametrize("way", ["plain", "interleaved"])
@torch.no_grad()
def test_rows_that_are_together_are_served(way, count):
    model, x, names = adapted(way), images(count), NAMES[:count]
    expected = one_by_one(model, x, names)
    torch.testing.assert_close(model(x, adapter_names=names), expected, **EXACT)
    for row, prediction in zip(expected, pool_of(model)(x, names), strict=True):
        torch.testing.assert_close(prediction.logits.double(), row, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_without_an_output_per_image_is_refused():
    with pytest.raises(ValueError, match="gives no tensor with a first axis of 3 images"):
        adapted("a loss")(images(3), adapter_names=NAMES[:3])


@torch.no_grad()
def test_a_model_is_asked_once_for_every_shape_and_set_of_layers():
    model = adapted("plain")
    base, x = model.get_base_model(), images(8)

    def calls(*args, **kwargs):
        before = base.calls
        model(*args, **kwargs)
        return base.calls - before

    assert calls(x, adapter_names=NAMES) == 2
    assert calls(x, adapter_names=NAMES) == calls(x[:3], adapter_names=["two", "one", "three"]) == 1
    assert calls(x[:, :5], adapter_names=NAMES) == 2 and calls(x[:, :5], adapter_names=NAMES) == 1
    assert calls(x, adapter_names=["one"] * 8) == calls(x) == 1
    layers = [name for name, module in base.named_modules() if isinstance(module, FacTLinear)]
    model.add_adapter("first layer", FacTConfig(rank=1, target_modules=layers[:1], modules_to_save=[]))
    assert calls(x, adapter_names=["first layer", "__base__"] * 4) == 2
    assert calls(x, adapter_names=["first layer", "__base__"] * 4) == 1


# Gradients


def gradients(model, x, run):
    """Of a loss with respect to all that is trained and to the images; those that are missing as zeros."""
    x = x.clone().requires_grad_(True)
    model.zero_grad()
    run(x).square().sum().backward()
    tensors = {"images": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    return {name: torch.zeros_like(t) if t.grad is None else t.grad.clone() for name, t in tensors.items()}


def expected_gradients(way):
    model = adapted(way, trained=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def run(x):
        rows = []
        for image, name in zip(x.split(1), NAMES, strict=True):
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model(image))
            else:
                model.base_model.set_adapter(name)
                rows.append(model(image))
            for n, parameter in model.named_parameters():  # which PEFT freezes with the adapter
                parameter.requires_grad_(n in trained)
        return torch.cat(rows)

    return gradients(model, images(8), run)


def check_gradients(got, expected):
    assert got.keys() == expected.keys()
    assert all(
        gradient.abs().max() > 1e-6 for name, gradient in expected.items() if name.endswith((".one", ".two", ".three"))
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **EXACT, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("way", ["plain", "frozen"])
def test_gradients_are_those_of_one_adapter_at_a_time(way):
    """Also where the first block computes without a graph; its factors then get what the other blocks give."""
    model = adapted(way, trained=True)
    got = gradients(model, images(8), lambda x: model(x, adapter_names=NAMES))
    check_gradients(got, expected_gradients(way))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", ["reentrant", "other"])
def test_checkpoints_inside_the_model_are_refused(way):
    """They would be computed again without the adapters."""
    x = images(8).requires_grad_(True)
    for names in (NAMES, ["two"] * 8):
        model = adapted(way, trained=True)
        with pytest.raises(NotImplementedError, match="does not work with activation checkpointing"):
            model(x, adapter_names=names)
        with torch.no_grad():
            expected = one_by_one(model, x, names)
            torch.testing.assert_close(model(x, adapter_names=names), expected, **EXACT)
        with pytest.raises(NotImplementedError, match="does not work with activation checkpointing"):
            model(x, adapter_names=names)
    # Calls of one adapter are computed again as they were.
    plain = adapted("plain", trained=True)
    checkpointed = adapted(way, trained=True)
    runs = [gradients(each, images(8), lambda x, each=each: each(x)) for each in (checkpointed, plain)]
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_call_gives_the_gradients(use_reentrant):
    model = adapted("plain", trained=True)
    got = gradients(
        model,
        images(8),
        lambda x: checkpoint(lambda x: model(x, adapter_names=NAMES), x, use_reentrant=use_reentrant),
    )
    check_gradients(got, expected_gradients("plain"))
