"""How far a converted checkpoint of another implementation of FacT is from what that one computes, in float64.

    python -m benchmarks.exactness.source_formats

The layers of each implementation are written here from its formulas, without its code, on a tiny ViT of timm or a tiny
SAM with random numbers everywhere. It prints the largest difference of the outputs of the adapted and of the merged
model, relative to the largest output, and how far the outputs are from those without the adapter.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fact_peft import convert_checkpoint

RANK = 3
SCALE = 0.7
# What MA-SAM and micro-sam train in full.
TRAINED = ("mask_decoder", "prompt_encoder")
Added = Callable[[Tensor], Tensor]


class SourceLinear(nn.Module):
    """A linear layer and what another implementation adds to its output."""

    def __init__(self, base: nn.Module, added: Added) -> None:
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.added(x)
        return y


def with_added(model: nn.Module, added: dict[str, Added]) -> nn.Module:
    """Put each function of `added`, by layer name, beside its layer."""
    for name, function in added.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SourceLinear(model.get_submodule(name), function))
    return model


def weight(out_features: int, in_features: int) -> Tensor:
    return 0.3 * torch.randn(out_features, in_features, dtype=torch.float64)


def in_blocks(x: Tensor, count: int) -> Tensor:
    """(..., count p) to (..., count, p)."""
    return x.unflatten(-1, (count, -1))


def authors_tensor_train(model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
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
    return saved, with_added(model, added)


def authors_tucker(model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
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
    return saved, with_added(model, added)


def sam() -> nn.Module:
    torch.manual_seed(3)
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

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


def pictures() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    image = 255 * torch.rand(3, 64, 64, generator=generator, dtype=torch.float64)
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]], dtype=torch.float64)
    return [{"image": image, "original_size": (64, 64), "boxes": box}]


def masks(model: nn.Module) -> Tensor:
    return model(pictures(), multimask_output=True)[0]["low_res_logits"]


def train_heads(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(TRAINED):
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def ma_sam(model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
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
    with_added(model, added)
    train_heads(model)
    saved.update({name: value for name, value in model.state_dict().items() if name.startswith(TRAINED)})
    return saved, model


def micro_sam(model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
    """q and v of every qkv, u and v of its own in each, no scale; saved with all of SAM."""
    base, added = dict(model.state_dict()), {}
    for i in range(2):
        layer = f"image_encoder.blocks.{i}.attn.qkv"
        q, v_core, u, v = weight(RANK, RANK), weight(RANK, RANK), weight(RANK, 32), weight(32, RANK)
        names = ("q_FacTs", "v_FacTs", "FacTu", "FacTv")
        base.update({f"{layer}.{name}.weight": value for name, value in zip(names, (q, v_core, u, v), strict=True)})
        for kind in ("weight", "bias"):
            base[f"{layer}.qkv_proj.{kind}"] = base.pop(f"{layer}.{kind}")
        added[layer] = lambda x, q=q, v_core=v_core, u=u, v=v: torch.cat(
            [x @ u.T @ q.T @ v.T, torch.zeros_like(x), x @ u.T @ v_core.T @ v.T], dim=-1
        )
    with_added(model, added)
    train_heads(model)
    trained = {name: value for name, value in model.state_dict().items() if name.startswith(TRAINED)}
    return {"model_state": {f"sam.{name}": value for name, value in {**base, **trained}.items()}}, model


def vit() -> nn.Module:
    torch.manual_seed(7)
    import timm

    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    nn.init.normal_(model.head.weight)
    return model.double().eval()


def scores(model: nn.Module) -> Tensor:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    y: Tensor = model(images)
    return y


# Title, the formulas, the source format, the scale of the run, the model, and its outputs.
IMPLEMENTATIONS = (
    ("authors, tensor-train", authors_tensor_train, "authors", SCALE, vit, scores),
    ("authors, Tucker", authors_tucker, "authors", SCALE, vit, scores),
    ("MA-SAM", ma_sam, "ma-sam", SCALE, sam, masks),
    ("micro-sam", micro_sam, "micro-sam", None, sam, masks),
)


@torch.no_grad()
def errors(
    formulas: Callable[..., Any],
    source_format: str,
    scale: float | None,
    build: Callable[[], nn.Module],
    outputs: Added,
) -> tuple[float, float, float]:
    """Relative errors of the outputs of adapted and merged model, and the relative size of what the adapter changes."""
    model = build()
    torch.manual_seed(0)
    saved, theirs = formulas(model)
    expected = outputs(theirs)

    def distance(ours: nn.Module) -> float:
        return ((outputs(ours) - expected).abs().max() / expected.abs().max()).item()

    with tempfile.TemporaryDirectory() as folder:
        torch.save(saved, Path(folder, "checkpoint.pt"))
        convert_checkpoint(Path(folder, "checkpoint.pt"), Path(folder, "adapter"), source_format, scale)
        adapted = PeftModel.from_pretrained(build(), str(Path(folder, "adapter")), autocast_adapter_dtype=False)
    return distance(adapted), distance(adapted.merge_and_unload()), distance(build())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| checkpoint of | adapted | merged | without the adapter |\n|{'---|' * 4}")
    for title, *implementation in IMPLEMENTATIONS:
        print(f"| {title} | " + " | ".join(f"{error:.1e}" for error in errors(*implementation)) + " |")


if __name__ == "__main__":
    main()
