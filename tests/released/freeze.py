"""Keep adapters of this version for ever: ``python -m released.freeze`` in ``tests/``, when a version is released.

Writes ``tests/released/VERSION/``: a folder an adapter, as users save them, and beside its files ``logits.safetensors``
with what the adapted backbone says of a few images in float64. `test_released.py` loads all of them with later code.
Backbones and images come from formulas, since random numbers change from release to release.
"""

from pathlib import Path

import torch
from backbones import BACKBONES, NUM_LABELS, logits
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import fact_peft

HERE = Path(__file__).parent
LABELS = ["cat", "dog", "Gänseblümchen", "a label, with a comma", ""]
ADAPTERS = {
    f"{backbone}-{decomposition}": {"rank": 4, "decomposition": decomposition, "scale": 0.5, "labels": LABELS}
    for backbone in ("vit", "swin", "timm")
    for decomposition in ("tt", "tk")
} | {
    "vit-attention": {"rank": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": []},
    "vit-biases": {"rank": 2, "bias": "fact_only", "layers_to_transform": [1], "init_weights": "orthogonal"},
}


def waves(shape: torch.Size, phase: int) -> Tensor:
    """Numbers in +-1 that any version of anything computes alike, in float64."""
    count = shape.numel()
    steps = (torch.arange(count, dtype=torch.int64) * 7919 + phase * 104729) % 2003
    return (steps.double() / 1001 - 1).reshape(shape)


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter]) -> None:
    """Set every parameter to waves of about the size of an initialised one."""
    for phase, name in enumerate(sorted(parameters)):
        parameter = parameters[name]
        parameter.copy_(waves(parameter.shape, phase) * (0.4 if parameter.ndim > 1 else 0.1))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)


def backbone(name: str) -> nn.Module:
    """One of the backbones of the suite in evaluation mode, with weights that no random generator decides."""
    model = BACKBONES[name.partition("-")[0]]().eval()
    fill(dict(model.named_parameters()))
    return model


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    """Logits (3, labels) in float64."""
    return logits(model.double(), waves(torch.Size((3, 3, 16, 16)), phase=-1))


def main() -> None:
    assert len(LABELS) == NUM_LABELS
    folder = HERE / ".".join(fact_peft.__version__.split(".")[:2])
    for name, settings in ADAPTERS.items():
        model = get_peft_model(backbone(name), fact_peft.FacTConfig(**settings)).eval()
        fill({key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad})
        model.save_pretrained(str(folder / name))
        (folder / name / "README.md").unlink()
        save_file({"logits": scores(model)}, folder / name / "logits.safetensors")
        print(folder / name)


if __name__ == "__main__":
    main()
