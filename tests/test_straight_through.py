"""Training with rounded numbers: the last epochs of a loop, and of transformers' Trainer."""

import pytest
import torch
from accelerate import Accelerator
from backbones import NUM_LABELS, images, logits, make_backbone
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from fact_peft import FacTConfig, StraightThrough, StraightThroughCallback, hotswap_adapter
from fact_peft.adapter.storage import pack, unpack

LABELS = torch.arange(8) % NUM_LABELS


def adapted(**settings):
    model = make_backbone("vit")
    torch.manual_seed(0)
    return get_peft_model(model, FacTConfig(**{"rank": 4, "init_weights": False, **settings}))


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model):
    return nn.functional.cross_entropy(logits(model, images(count=8)), LABELS)


def rounded(name, number):
    """By hand: factors in 4 bits, the head's weight in 8, its bias in float16."""
    if number.dim() == 1:
        return number.half().float()
    return unpack(pack(number, 8 if "classifier" in name else 4))


def test_a_step_takes_the_gradient_at_the_rounded_numbers_to_the_exact_ones():
    model = adapted()
    parameters = trained(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    exact = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    StraightThrough(model, optimizer, "int4")
    for name, parameter in parameters.items():  # which are in no other form than before
        assert torch.equal(parameter, rounded(name, exact[name]))
    for _ in range(3):
        gradients = dict(zip(parameters, torch.autograd.grad(loss_of(model), list(parameters.values())), strict=True))
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            exact[name] = exact[name] - 0.1 * gradients[name]
            torch.testing.assert_close(parameter, rounded(name, exact[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decomposition", ["tt", "tk", "cp"])
def test_training_goes_on_and_what_is_saved_is_what_was_trained(decomposition, tmp_path):
    model = adapted(decomposition=decomposition)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()  # so that it has a state
    optimizer.zero_grad()
    rounding = StraightThrough(model, Accelerator(cpu=True).prepare(optimizer), "int4")
    first = loss_of(model).item()
    for _ in range(15):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model).item() < 0.8 * first
    rounding.stop()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, images()), logits(model, images()))
    assert loaded.peft_config["default"].storage == "int4"
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    loss_of(model).backward()
    optimizer.step()
    changed = (
        trained(model)["base_model.model.factors.32x32.fact_U.default"]
        - before["base_model.model.factors.32x32.fact_U.default"]
    )
    assert changed.unique().numel() > 100  # exact steps again, not multiples of a group's


def by_load_state_dict(model, other, folder):
    model.load_state_dict(other.state_dict())


def by_set_peft_model_state_dict(model, other, folder):
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def by_hotswap(model, other, folder):
    other.save_pretrained(folder)
    hotswap_adapter(model, folder)


def by_data(model, other, folder):
    theirs = trained(other)
    for name, parameter in trained(model).items():
        parameter.data.copy_(theirs[name])


@pytest.mark.parametrize("write", [by_load_state_dict, by_set_peft_model_state_dict, by_hotswap, by_data])
def test_numbers_that_somebody_else_wrote_are_trained_on(write, tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    StraightThrough(model, optimizer, "int8")
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.manual_seed(5)
    other = get_peft_model(make_backbone("vit"), FacTConfig(rank=4, init_weights=False))
    write(model, other, tmp_path)
    exact = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    loss_of(model).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    optimizer.step()
    for name, parameter in trained(model).items():
        expected = exact[name] - 0.01 * gradients[name]
        expected = expected.half().float() if expected.dim() == 1 else unpack(pack(expected, 8))
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused():
    model = adapted()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    with pytest.raises(ValueError, match="does not exist"):
        StraightThrough(model, optimizer, "int4", adapter_name="other")
    with pytest.raises(ValueError, match="storage='int3' is unknown"):
        StraightThrough(model, optimizer, "int3")
    assert model.peft_config["default"].storage is None
    torch.testing.assert_close(dict(trained(model)), before, rtol=0, atol=0)


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": images(count=8)[index], "labels": LABELS[index]}


def test_the_callback_rounds_the_last_epochs_of_trainer(tmp_path):
    set_seed(0)
    model = adapted()
    seen = []

    class Watching(StraightThroughCallback):
        def on_step_end(self, args, state, control, **kwargs):
            U = model.get_base_model().factors["32x32"].fact_U["default"]
            seen.append(torch.equal(unpack(pack(U, 4)), U))

    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=1e-2, label_names=["labels"],
        remove_unused_columns=False, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="epoch",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Images(), callbacks=[Watching("int4", epochs=2)]).train()
    assert seen == [False] * 4 + [True] * 4
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "checkpoint-8").eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, images()), logits(model.eval(), images()))
    sizes = [(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").stat().st_size for step in (4, 6)]
    assert sizes[1] < sizes[0] / 2
