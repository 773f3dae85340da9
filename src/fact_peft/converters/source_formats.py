"""Readers for the checkpoints of other implementations of FacT.

- ``"authors"``: ``FacT/fact_tt.py`` and ``FacT/fact_tk.py`` of github.com/JieShibo/PETL-ViT, on timm's ViT. There is
  one U and V. In every block q, k, v and proj have one core each, fc1 and fc2 four each. The Tucker script reshapes the
  cores of the MLP so that slices and ranks interleave, which the paper's P and C cannot express. There is still one
  r x r core for each slice, so a Tucker checkpoint becomes a tensor-train adapter with the same increments.
- ``"ma-sam"``: the file that ``save_parameters`` of github.com/cchen-cc/MA-SAM writes. There is one U and V. The 3D
  convolutions, ``.adapter_``, do not belong to FacT.
- ``"micro-sam"``: micro-sam and peft-sam of github.com/computational-cell-analytics. Every adapted block has a U and V,
  and there is no scale. The checkpoints also hold the rest of the image encoder, which is frozen and belongs to the
  model that the run started from. Load the adapter on that model.

MA-SAM and micro-sam adapt q and v in blocks of the image encoder of ``segment_anything``'s ``Sam``, and train its
prompt encoder and mask decoder in full.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# In the authors' scripts the MLP is four times as wide as the token stream, and a block has 4 + 4 + 4 slices.
EXPANSION = 4
SLICES_PER_BLOCK = 12
SAM_HEADS = ("prompt_encoder", "mask_decoder")
ADAPTED_BY_MICRO_SAM = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.q_FacTs\.weight")
FROZEN_BY_MICRO_SAM = re.compile(
    r"image_encoder\.(pos_embed|patch_embed\.proj\.(weight|bias)|neck\.\d\.(weight|bias)|blocks\.\d+\."
    r"(norm[12]\.(weight|bias)|mlp\.lin[12]\.(weight|bias)|attn\.(rel_pos_[hw]|(proj|qkv|qkv\.qkv_proj)\.(weight|bias))))"
)


@dataclass(frozen=True)
class SourceLayer:
    """One linear layer of another implementation: y = x (W + dW), where slice k of dW is s U Sigma_k V^T."""

    in_features: int
    out_features: int
    U: Tensor  # (d, r), shared by all layers of its stack
    V: Tensor  # (e, r), shared by all layers of its stack
    cores: Tensor  # Sigma_k (slices, r, r), row-major over (input block, output block)
    parts: str = ""  # which of q, k and v have slices; empty if the whole layer has


Read = tuple[dict[str, SourceLayer], dict[str, Tensor]]  # the layers and the tensors of the heads, by name


def read_authors(tensors: dict[str, Tensor]) -> Read:
    if "FacTp" in tensors:
        tensors.update(tensor_train_cores(take(tensors, "FacTc", 3), take(tensors, "FacTp")))
    U, V = take(tensors, "FacTu.weight").t(), take(tensors, "FacTv.weight")
    width = len(U)
    layers: dict[str, SourceLayer] = {}
    index = 0
    while index == 0 or f"blocks.{index}.attn.q_FacTs.weight" in tensors:
        block = f"blocks.{index}"
        qkv = torch.cat([take(tensors, f"{block}.attn.{name}_FacTs.weight") for name in "qkv"])
        proj = take(tensors, f"{block}.attn.proj_FacTs.weight")
        fc1, fc2 = (take(tensors, f"{block}.mlp.{name}_FacTs.weight") for name in ("fc1", "fc2"))
        for name, in_features, out_features, weight in (
            ("attn.qkv", width, 3 * width, qkv),
            ("attn.proj", width, width, proj),
            ("mlp.fc1", width, EXPANSION * width, fc1),
            ("mlp.fc2", EXPANSION * width, width, fc2),
        ):
            layers[f"{block}.{name}"] = SourceLayer(in_features, out_features, U, V, cores_of(weight))
        index += 1
    return layers, take_modules(tensors, "head", "head_dist")


def tensor_train_cores(C: Tensor, P: Tensor) -> dict[str, Tensor]:
    """The cores of a Tucker checkpoint under the names and in the shapes of the tensor-train script.

    C is ``FacTc`` (r, r, r), whose last axis is contracted with P, ``FacTp`` (r, slices).
    """
    rank, num_slices = P.shape
    weights = {}
    for index in range(num_slices // SLICES_PER_BLOCK):
        mixed = C @ P[:, index * SLICES_PER_BLOCK : (index + 1) * SLICES_PER_BLOCK]
        attention, up, down = mixed.split([4, EXPANSION, EXPANSION], dim=2)
        block = f"blocks.{index}"
        for name, core in zip(("q", "k", "v", "proj"), attention.unbind(2), strict=True):
            weights[f"{block}.attn.{name}_FacTs.weight"] = core.t()
        # As in their script, an axis of the core is merged with that of the slices.
        weights[f"{block}.mlp.fc1_FacTs.weight"] = up.reshape(rank, EXPANSION * rank).t()
        weights[f"{block}.mlp.fc2_FacTs.weight"] = down.reshape(rank, EXPANSION * rank)
    return weights


def read_ma_sam(tensors: dict[str, Tensor]) -> Read:
    U, V = (take(tensors, f"image_encoder.{name}.weight") for name in ("FacTu", "FacTv"))
    layers: dict[str, SourceLayer] = {}
    while not layers or f"q_FacTs_{len(layers):03d}" in tensors:
        q, v = (take(tensors, f"{name}_FacTs_{len(layers):03d}") for name in "qv")
        layers[f"image_encoder.blocks.{len(layers)}.attn.qkv"] = sam_layer(U, V, q, v)
    return layers, take_modules(tensors, *SAM_HEADS)


def read_micro_sam(tensors: dict[str, Tensor]) -> Read:
    for name in list(tensors):
        tensors[name.removeprefix("sam.")] = tensors.pop(name)
    adapted = sorted(int(match[1]) for match in map(ADAPTED_BY_MICRO_SAM.fullmatch, tensors) if match)
    if not adapted:
        raise ValueError(
            "No block of the image encoder has q_FacTs in the checkpoint: it was trained in full, or by another method."
        )
    layers = {}
    for layer in [f"image_encoder.blocks.{index}.attn.qkv" for index in adapted]:
        names = ("FacTu", "FacTv", "q_FacTs", "v_FacTs")
        layers[layer] = sam_layer(*(take(tensors, f"{layer}.{name}.weight") for name in names))
    for name in filter(FROZEN_BY_MICRO_SAM.fullmatch, list(tensors)):
        del tensors[name]
    return layers, take_modules(tensors, *SAM_HEADS)


def sam_layer(U: Tensor, V: Tensor, q: Tensor, v: Tensor) -> SourceLayer:
    """The layer that makes q, k and v, from U^T (r, d), V (e, r) and the weights (r, r) of q and v between them."""
    return SourceLayer(U.shape[1], 3 * len(V), U.t(), V, cores_of(torch.cat([q, v])), parts="qv")


def cores_of(weight: Tensor) -> Tensor:
    """The cores (a b, r, r) in the weight (b r, a r) of the ``nn.Linear`` between U and V."""
    rank = min(weight.shape)
    blocks = weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))  # (b, outputs, a, inputs)
    return blocks.permute(2, 0, 3, 1).flatten(0, 1)


def take(tensors: dict[str, Tensor], name: str, num_axes: int = 2) -> Tensor:
    """Remove and return a tensor of a checkpoint."""
    if name not in tensors:
        raise ValueError(f"{name} is missing in the checkpoint; was it saved by the code that it is converted from?")
    if not isinstance(tensors[name], Tensor) or tensors[name].dim() != num_axes:
        raise ValueError(f"{name} is no tensor of {num_axes} axes; was it saved by the code that it is converted from?")
    return tensors.pop(name)


def take_modules(tensors: dict[str, Tensor], *modules: str) -> dict[str, Tensor]:
    """Remove and return all tensors of some modules."""
    return {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[0] in modules}


@dataclass(frozen=True)
class SourceFormat:
    """How another implementation of FacT saves its checkpoints."""

    read: Callable[[dict[str, Tensor]], Read]  # removes from the tensors what it knows
    scale: float | None = None  # the factor s, if the implementation has a fixed one; None if every run has its own
    share: Literal["model", "block"] = "model"  # which layers share U and V, as `FacTConfig.share`
    state: str = ""  # key of the checkpoint under which the tensors are; empty if they are at its top


FORMATS = {
    "authors": SourceFormat(read_authors),
    "ma-sam": SourceFormat(read_ma_sam),
    "micro-sam": SourceFormat(read_micro_sam, scale=1.0, share="block", state="model_state"),
}
