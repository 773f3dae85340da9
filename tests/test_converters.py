"""Checkpoints of other implementations of FacT, against layers built from their formulas in float64."""

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from benchmarks.exactness import source_formats
from benchmarks.exactness.source_formats import (
    IMPLEMENTATIONS,
    RANK,
    SCALE,
    authors_tensor_train,
    authors_tucker,
    errors,
    ma_sam,
    masks,
    micro_sam,
)
from fact_peft import convert_checkpoint, convert_from

# Float64; they add the same numbers in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def sam():
    pytest.importorskip("segment_anything")
    return source_formats.sam()


@pytest.mark.parametrize("implementation", [authors_tensor_train, authors_tucker])
def test_a_checkpoint_of_the_authors_computes_the_same(implementation, tmp_path):
    torch.manual_seed(0)
    saved, theirs = implementation(make_backbone("timm", torch.float64))
    nn.init.normal_(theirs.head.weight)
    saved.update({f"head.{name}": value.detach() for name, value in theirs.head.named_parameters()})
    torch.save(saved, tmp_path / "cifar.pt")

    config = convert_checkpoint(tmp_path / "cifar.pt", tmp_path / "adapter", "authors", scale=SCALE)
    ours = PeftModel.from_pretrained(
        make_backbone("timm", torch.float64), tmp_path / "adapter", autocast_adapter_dtype=False
    )
    expected = logits(theirs, images(torch.float64))
    torch.testing.assert_close(logits(ours, images(torch.float64)), expected, **EXACT)
    assert (logits(make_backbone("timm", torch.float64), images(torch.float64)) - expected).abs().max() > 0.1
    assert config.modules_to_save == ["head"]
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged, images(torch.float64)), expected, **EXACT)


def test_a_checkpoint_of_ma_sam_computes_the_same(tmp_path):
    saved, theirs = ma_sam(sam())
    torch.save(saved, tmp_path / "epoch_399.pth")
    config = convert_checkpoint(tmp_path / "epoch_399.pth", tmp_path / "adapter", "ma-sam", scale=SCALE)
    assert config.modules_to_save == ["mask_decoder", "prompt_encoder"]
    ours = PeftModel.from_pretrained(sam(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(masks(ours), masks(theirs), **EXACT)
    assert (masks(sam()) - masks(theirs)).abs().max() > 0.1
    # Two stacks of four slices: the keys own none.
    assert config.layout == ["image_encoder.blocks.0-1: attn.qkv 32x96[qv/qkv]"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.factors.32x32.fact_Sigma"].shape == (4, RANK, RANK)


def nothing(saved):
    pass


def as_trained(saved):
    """What the trainer saves beside the model."""
    saved.update(epoch=3, iteration=100, best_metric=0.5, optimizer_state={"state": {}}, init={"name": "run"})


def state_alone(saved):
    state = saved.pop("model_state")
    saved.update(state)


@pytest.mark.parametrize("form", [nothing, as_trained, state_alone])
def test_a_checkpoint_of_micro_sam_computes_the_same(form, tmp_path):
    torch.manual_seed(0)
    saved, theirs = micro_sam(sam())
    form(saved)
    torch.save(saved, tmp_path / "best.pt")
    config = convert_checkpoint(tmp_path / "best.pt", tmp_path / "adapter", "micro-sam")
    assert (config.scale, config.share, config.rank) == (1.0, "block", RANK)
    assert config.modules_to_save == ["mask_decoder", "prompt_encoder"]
    assert config.layout == ["image_encoder.blocks.0-1: attn.qkv 32x96[qv/qkv]"]
    ours = PeftModel.from_pretrained(sam(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(masks(ours), masks(theirs), **EXACT)
    assert (masks(sam()) - masks(theirs)).abs().max() > 0.1
    torch.testing.assert_close(masks(ours.merge_and_unload()), masks(theirs), **EXACT)


def test_a_checkpoint_of_micro_sam_may_adapt_some_blocks_only(tmp_path):
    saved, theirs = micro_sam(sam())
    state = saved["model_state"]
    layer = "sam.image_encoder.blocks.0.attn.qkv"
    for kind in ("weight", "bias"):
        state[f"{layer}.{kind}"] = state.pop(f"{layer}.qkv_proj.{kind}")
    for name in ("q_FacTs", "v_FacTs", "FacTu", "FacTv"):
        del state[f"{layer}.{name}.weight"]
    theirs.image_encoder.blocks[0].attn.qkv = theirs.image_encoder.blocks[0].attn.qkv.base
    torch.save(saved, tmp_path / "best.pt")
    convert_checkpoint(tmp_path / "best.pt", tmp_path / "adapter", "micro-sam")
    ours = PeftModel.from_pretrained(sam(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(masks(ours), masks(theirs), **EXACT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: saved.update(decoder_state={}), "no place in a FacT adapter: decoder_state"),
        (
            lambda saved: saved["model_state"].update({"sam.image_encoder.blocks.0.attn.qkv.w_a_linear_q.weight": 1}),
            r"no place in a FacT adapter: image_encoder\.blocks\.0\.attn\.qkv\.w_a_linear_q\.weight",
        ),
        (
            lambda saved: saved["model_state"].pop("sam.image_encoder.blocks.1.attn.qkv.FacTv.weight"),
            r"blocks\.1\.attn\.qkv\.FacTv\.weight is missing",
        ),
        (
            lambda saved: saved["model_state"].update(
                {"sam.image_encoder.blocks.1.attn.qkv.FacTu.weight": torch.zeros(2, 32)}
            ),
            r"blocks\.1\.attn\.qkv has U of shape \(32, 2\); \(32, 3\) is needed",
        ),
        (
            lambda saved: saved.update(model_state={"sam.mask_decoder.x": torch.ones(1)}),
            "No block of the image encoder",
        ),
    ],
)
def test_what_of_micro_sam_cannot_be_held_is_refused_by_name(change, said, tmp_path):
    saved, _ = micro_sam(sam())
    change(saved)
    torch.save(saved, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(tmp_path / "best.pt", tmp_path / "adapter", "micro-sam")
    assert not (tmp_path / "adapter").exists()


def test_micro_sam_has_no_scale():
    with pytest.raises(ValueError, match=r"scale=2\.0, but 'micro-sam' always computes with 1"):
        convert_from("micro-sam", {}, scale=2.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda implementation: implementation[0])
def test_the_benchmark_finds_no_error(implementation):
    pytest.importorskip("segment_anything" if "sam" in implementation[0] else "timm")
    adapted, merged, without = errors(*implementation[1:])
    assert max(adapted, merged) < 1e-13 and without > 0.1


def test_what_an_adapter_cannot_hold_is_refused_by_name(tmp_path):
    saved, _ = ma_sam(sam())
    convolution = "image_encoder.ImageEncoderViT.blocks.0.Block.adapter_conv.weight"
    saved[convolution] = torch.zeros(1)
    with pytest.raises(ValueError, match=convolution.replace(".", r"\.")):
        convert_from("ma-sam", saved, SCALE)
    config, _ = convert_from("ma-sam", saved, SCALE, leave_out=[".adapter_"])
    assert config.scale == SCALE


def test_a_checkpoint_does_not_say_its_scale():
    with pytest.raises(ValueError, match="scale=s"):
        convert_from("authors", {})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda saved: saved.pop("blocks.1.mlp.fc2_FacTs.weight"), r"blocks\.1\.mlp\.fc2_FacTs\.weight is missing"),
        (lambda saved: saved.pop("blocks.0.attn.q_FacTs.weight"), r"blocks\.0\.attn\.q_FacTs\.weight is missing"),
        (lambda saved: saved.update({"FacTv.weight": torch.zeros(32, 2)}), r"V of shape \(32, 2\); \(32, 3\)"),
        (lambda saved: saved["blocks.0.attn.proj_FacTs.weight"].fill_(torch.nan), r"attn\.proj has NaN"),
        (lambda saved: saved.update({"FacTv.weight": torch.zeros(32)}), r"FacTv\.weight is no tensor of 2 axes"),
        (lambda saved: saved.update({"FacTu.weight": 3}), r"FacTu\.weight is no tensor of 2 axes"),
        (lambda saved: saved.update({1: torch.zeros(2)}), "keys that are no names: 1"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_written(damage, said, tmp_path):
    saved, _ = authors_tensor_train(make_backbone("timm", torch.float64))
    damage(saved)
    torch.save(saved, tmp_path / "cifar.pt")
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(tmp_path / "cifar.pt", tmp_path / "adapter", "authors", scale=1.0)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [(torch.ones(2), "No block of the image encoder"), ({1: torch.ones(2)}, "keys that are no names: 1")],
)
def test_a_state_that_is_no_state_dict_is_refused(state, said):
    with pytest.raises(ValueError, match=said):
        convert_from("micro-sam", {"model_state": state})


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    (tmp_path / "run.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(ValueError, match=r"run\.safetensors cannot be read as tensors"):
        convert_checkpoint(tmp_path / "run.safetensors", tmp_path / "adapter", "authors", scale=1.0)


class Trainer:
    """What a pickle may hold beside tensors."""

    def __reduce__(self):
        return pytest.fail, ("code in a checkpoint was run",)


def test_no_code_in_a_pickle_is_run(tmp_path):
    torch.save({"FacTu.weight": torch.zeros(2, 32), "trainer": Trainer()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="never run here"):
        convert_checkpoint(tmp_path / "run.pt", tmp_path / "adapter", "authors", scale=1.0)
    with pytest.raises(ValueError, match="does not exist"):
        convert_checkpoint(tmp_path / "other.pt", tmp_path / "adapter", "authors", scale=1.0)


def test_the_command_converts_and_prints(tmp_path, run_module):
    saved, _ = authors_tensor_train(make_backbone("timm", torch.float64))
    torch.save(saved, tmp_path / "cifar.pt")
    command = ["fact_peft", "convert", tmp_path / "cifar.pt", tmp_path / "adapter", "--from", "authors"]
    assert "rank 3, scale 10" in run_module(*command, "--scale", 10)
    with pytest.raises(SystemExit, match="does not say with which scale"):
        run_module(*command)
