"""Checkpoints in float16 or bfloat16, whose dtype transformers keeps: the adapter trains in float32, head included."""

import re

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import BACKBONES, images, logits, make_backbone, vit
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.launchers.launching import ROOT, launch
from fact_peft import FacTConfig

HALF = [torch.float16, torch.bfloat16]
# Of logits in half precision, relative to the largest: ten times the rounding of one operation.
TOLERANCE = {torch.float16: 0.005, torch.bfloat16: 0.04}


def adapted(dtype, backbone="vit", **settings):
    model = make_backbone(backbone, dtype)
    torch.manual_seed(0)
    return get_peft_model(model, FacTConfig(**{"rank": 4, "init_weights": False, **settings}))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def losses(model, dtype, steps=5):
    optimizer = optimizer_of(model)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(logits(model, images(dtype)), torch.arange(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_adamw_trains_as_in_float32(backbone, dtype):
    exact, half = (list(losses(adapted(each, backbone), each)) for each in (torch.float32, dtype))
    assert half[-1] < 0.8 * half[0]
    torch.testing.assert_close(torch.tensor(half), torch.tensor(exact), rtol=0, atol=TOLERANCE[dtype] * exact[0])


@pytest.mark.parametrize("dtype", HALF)
def test_a_grad_scaler_unscales_every_gradient(dtype):
    model = adapted(dtype)
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=1024)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", dtype):
        loss = nn.functional.cross_entropy(logits(model, images(dtype)), torch.arange(3))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


class Between(nn.Module):
    """A trained module with half-precision layers before and behind it, which takes and gives more than one tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *, others, places):
        return {"x": self.linear(x) + sum(others), "places": places}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"first": nn.Linear(8, 8)}) for _ in range(2))
        self.between = Between()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block["first"](x)
        given = self.between(x, others=[x, x], places=torch.arange(2))
        assert given["places"].dtype == torch.int64
        return self.last(given["x"])


@pytest.mark.parametrize("dtype", HALF)
def test_other_modules_to_save_give_what_the_layers_behind_them_take(dtype, tmp_path):
    torch.manual_seed(0)
    config = FacTConfig(rank=2, init_weights=False, target_modules=["first"], modules_to_save=["between"])
    model = get_peft_model(Net().to(dtype), config)
    x = torch.randn(4, 8, dtype=dtype)
    trained = model.base_model.model.between.modules_to_save["default"].linear.weight
    assert trained.dtype == torch.float32
    output = model(x)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert trained.grad.any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_trained_mask_decoder_of_sam(dtype):
    torch.manual_seed(0)
    architecture = ARCHITECTURES["SAM"]
    model, inputs = architecture.build().to(dtype), architecture.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    inputs["input_points"] = inputs["input_points"].to(dtype)
    plain = model(**inputs).pred_masks
    model = get_peft_model(model, FacTConfig(rank=4, modules_to_save=["mask_decoder"])).eval()
    masks = model(**inputs).pred_masks
    assert masks.dtype == plain.dtype
    torch.testing.assert_close(masks, plain, rtol=0, atol=TOLERANCE[dtype] * plain.abs().max().item())
    masks.float().sum().backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
def test_save_reload_and_merge(dtype, tmp_path):
    model = adapted(dtype)
    list(losses(model, dtype, steps=2))
    with torch.no_grad():
        expected = logits(model.eval(), images(dtype))
        model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(make_backbone("vit", dtype), tmp_path)
        assert torch.equal(logits(reloaded, images(dtype)), expected)
        merged = reloaded.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        error = (logits(merged, images(dtype)) - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_one_adapter_per_image(dtype):
    model = adapted(dtype).eval()
    torch.manual_seed(1)
    model.add_adapter("other", FacTConfig(rank=4, init_weights=False))
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        mixed = model(images(dtype), adapter_names=names).logits
        for image, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = logits(model, images(dtype))[image].float()
            else:
                model.set_adapter(name)
                alone = logits(model, images(dtype))[image]
            torch.testing.assert_close(mixed[image], alone, rtol=0, atol=TOLERANCE[dtype] * alone.abs().max().item())


def test_a_head_of_float32_is_called_as_it_is():
    model = get_peft_model(vit(), FacTConfig(rank=4))
    head = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    x = torch.randn(2, 32)
    assert torch.equal(head(x), head.modules_to_save["default"](x))


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", HALF)
def test_fully_shard_with_a_mixed_precision_policy(dtype, process_group):
    """FSDP wants one dtype of all that is trained in a group, and casts it by its policy."""
    model = adapted(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.get_base_model().vit.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    sharded = list(losses(model, dtype))
    assert sharded[-1] < 0.8 * sharded[0]


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": images(count=8)[index], "labels": index % 5}


def test_trainer_in_bf16(tmp_path):
    model = adapted(torch.bfloat16)  # autocast to bfloat16 does not take float16 on the CPU
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        tmp_path, bf16=True, use_cpu=True, max_steps=3, report_to=[], learning_rate=1e-2, logging_steps=1
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Images())
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == torch.float32 and not torch.equal(parameter, before[name])


LOOP = str(ROOT / "examples" / "accelerate_loop.py")


@pytest.mark.slow  # two processes
def test_zero3_trains_factors_and_head_of_a_half_precision_checkpoint_in_float32(tmp_path):
    """As the configuration file has it, in bfloat16. LoRA fails in DeepSpeed's ``defragment``."""
    commands = []
    for dtype in HALF:
        folder = tmp_path / str(dtype)
        torch.manual_seed(0)
        vit(num_labels=10).to(dtype).save_pretrained(folder / "base")
        command = [LOOP, "--model", str(folder / "base"), "--output_dir", str(folder), "--epochs"]
        commands += [[*command, "1"], [*command, "2"]]  # resumed
    accuracies = [float(found) for found in re.findall(r"validation accuracy ([\d.]+)%", launch("zero3", commands))]
    assert len(accuracies) == 4
    for dtype, first, second in zip(HALF, accuracies[::2], accuracies[1::2], strict=True):
        assert second > first
        saved = load_file(tmp_path / str(dtype) / "adapter" / "adapter_model.safetensors")
        assert {name.split(".")[2] for name in saved} == {"factors", "classifier"}
        for name, value in saved.items():
            assert value.dtype == torch.float32 and value.isfinite().all(), name
            assert not torch.equal(value, value.bfloat16().float()), name
