"""Checkpoints of other implementations of FacT, against layers built from their formulas in float64."""

import sys

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import PeftModel
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from fact_peft import convert_checkpoint, convert_from
from fact_peft.__main__ import main

RANK = 3
SCALE = 0.7
# Float64; the donors add the same numbers in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Donor(nn.Module):
    """A linear layer and what a donor adds to its output."""

    def __init__(self, base, added):
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x):
        return self.base(x) + self.added(x)


def donate(model, added):
    """Put each function of `added`, by layer name, beside its layer."""
    for name, function in added.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Donor(model.get_submodule(name), function))
    return model


def weight(out_features, in_features):
    return 0.3 * torch.randn(out_features, in_features, dtype=torch.float64)


def in_blocks(x, count):
    """(..., count p) to (..., count, p)."""
    return x.unflatten(-1, (count, -1))


def authors_tensor_train(model):
    """fact_tt.py: u and v shared; q, k, v, proj from r to r, fc1 from r to 4 r, fc2 from 4 r to r."""
    u, v = weight(RANK, 32), weight(32, RANK)
    saved, added = {"FacTu.weight": u, "FacTv.weight": v}, {}
    for i in range(2):
        q, k, v_core, proj = (weight(RANK, RANK) for _ in range(4))
        fc1, fc2 = weight(4 * RANK, RANK), weight(RANK, 4 * RANK)
        names = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
        cores = (q, k, v_core, proj, fc1, fc2)
        saved.update({f"blocks.{i}.{n}_FacTs.weight": c for n, c in zip(names, cores, strict=True)})
        added[f"blocks.{i}.attn.qkv"] = lambda x, qkv=(q, k, v_core): (
            torch.cat([x @ u.T @ core.T @ v.T for core in qkv], dim=-1) * SCALE
        )
        added[f"blocks.{i}.attn.proj"] = lambda x, core=proj: x @ u.T @ core.T @ v.T * SCALE
        added[f"blocks.{i}.mlp.fc1"] = lambda x, core=fc1: (in_blocks(x @ u.T @ core.T, 4) @ v.T).flatten(-2) * SCALE
        added[f"blocks.{i}.mlp.fc2"] = lambda x, core=fc2: (in_blocks(x, 4) @ u.T).flatten(-2) @ core.T @ v.T * SCALE
    return saved, donate(model, added)


def authors_tucker(model):
    """fact_tk.py: cores are FacTc @ FacTp[:, k]; those of the MLP are reshaped with the slices on the last axis."""
    u, v = weight(RANK, 32), weight(32, RANK)
    P = torch.randn(RANK, 24, dtype=torch.float64)
    C = torch.randn(RANK, RANK, RANK, dtype=torch.float64)
    saved, added = {"FacTp": P, "FacTc": C, "FacTu.weight": u, "FacTv.weight": v}, {}
    for i in range(2):
        attention = C @ P[:, 12 * i : 12 * i + 4]
        mlp = C @ P[:, 12 * i + 4 : 12 * i + 12]
        fc1, fc2 = mlp[:, :, :4].reshape(RANK, 4 * RANK), mlp[:, :, 4:].reshape(RANK, 4 * RANK)
        added[f"blocks.{i}.attn.qkv"] = lambda x, c=attention: (
            torch.cat([x @ u.T @ c[:, :, k] @ v.T for k in range(3)], dim=-1) * SCALE
        )
        added[f"blocks.{i}.attn.proj"] = lambda x, c=attention: x @ u.T @ c[:, :, 3] @ v.T * SCALE
        added[f"blocks.{i}.mlp.fc1"] = lambda x, c=fc1: (in_blocks(x @ u.T @ c, 4) @ v.T).flatten(-2) * SCALE
        added[f"blocks.{i}.mlp.fc2"] = lambda x, c=fc2: (in_blocks(x, 4) @ u.T).flatten(-2) @ c.T @ v.T * SCALE
    return saved, donate(model, added)


@pytest.mark.parametrize("donor", [authors_tensor_train, authors_tucker])
def test_a_checkpoint_of_the_authors_computes_the_same(donor, tmp_path):
    torch.manual_seed(0)
    saved, theirs = donor(make_backbone("timm", torch.float64))
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


def sam():
    torch.manual_seed(3)
    encoder = ImageEncoderViT(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=16,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(embed_dim=16, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4)
    transformer = TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(transformer_dim=16, transformer=transformer)
    model = Sam(encoder, prompts, decoder).double().eval()
    model.prompt_encoder.pe_layer.float()  # which multiplies by float32 coordinates
    return model


def pictures():
    generator = torch.Generator().manual_seed(5)
    image = 255 * torch.rand(3, 64, 64, generator=generator, dtype=torch.float64)
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]], dtype=torch.float64)
    return [{"image": image, "original_size": (64, 64), "boxes": box}]


def masks(model):
    return model(pictures(), multimask_output=True)[0]["low_res_logits"]


def ma_sam(model):
    """q and v of every qkv, u and v shared by all blocks, mask decoder and prompt encoder trained."""
    u, v = weight(RANK, 32), weight(32, RANK)
    saved, added = {}, {}
    for i in range(2):
        q, v_core = weight(RANK, RANK), weight(RANK, RANK)
        saved.update({f"q_FacTs_{i:03d}": q, f"v_FacTs_{i:03d}": v_core})
        added[f"image_encoder.blocks.{i}.attn.qkv"] = lambda x, q=q, v_core=v_core: torch.cat(
            [x @ u.T @ q.T @ v.T * SCALE, torch.zeros_like(x), x @ u.T @ v_core.T @ v.T * SCALE], dim=-1
        )
    saved.update({"image_encoder.FacTu.weight": u, "image_encoder.FacTv.weight": v})
    donate(model, added)
    for parameter in [*model.mask_decoder.parameters(), *model.prompt_encoder.parameters()]:
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    trained = ("mask_decoder", "prompt_encoder")
    saved.update({name: value for name, value in model.state_dict().items() if name.startswith(trained)})
    return saved, model


def test_a_checkpoint_of_ma_sam_computes_the_same(tmp_path):
    saved, theirs = ma_sam(sam())
    torch.save(saved, tmp_path / "epoch_399.pth")
    config = convert_checkpoint(tmp_path / "epoch_399.pth", tmp_path / "adapter", "ma-sam", scale=SCALE)
    assert config.modules_to_save == ["mask_decoder", "prompt_encoder"]
    ours = PeftModel.from_pretrained(sam(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(masks(ours), masks(theirs), **EXACT)
    assert (masks(sam()) - masks(theirs)).abs().max() > 0.1


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
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_written(damage, said, tmp_path):
    saved, _ = authors_tensor_train(make_backbone("timm", torch.float64))
    damage(saved)
    torch.save(saved, tmp_path / "cifar.pt")
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(tmp_path / "cifar.pt", tmp_path / "adapter", "authors", scale=1.0)
    assert not (tmp_path / "adapter").exists()


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


def test_the_command_converts_and_prints(tmp_path, monkeypatch, capsys):
    saved, _ = authors_tensor_train(make_backbone("timm", torch.float64))
    torch.save(saved, tmp_path / "cifar.pt")
    out = tmp_path / "adapter"
    command = ["fact_peft", "convert", str(tmp_path / "cifar.pt"), str(out), "--from", "authors"]
    monkeypatch.setattr(sys, "argv", [*command, "--scale", "10"])
    main()
    assert "rank 3, scale 10" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="does not say with which scale"):
        main()
