"""The one-liners of docs/segmentation.md: the head trains beside the factors, under the model's own loss, and is saved.

The table of the page is what is tested, row by row.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from test_architectures import build, outputs
from torch import Tensor, nn

from fact_peft import FacTConfig

PAGE = (Path(__file__).parents[1] / "docs" / "segmentation.md").read_text()
ROWS = re.findall(r"^\| (.+?)(?: \(.*\))? \| `(FacTConfig\(.*\))` \|", PAGE, re.MULTILINE)


def of_pixels(size: int, num_labels: int = 2) -> dict[str, Tensor]:
    return {"labels": torch.randint(num_labels, (2, size, size))}


def of_regions(size: int) -> dict[str, list[Tensor]]:
    """A left and a right half in either image, of classes 0 and 1."""
    masks = torch.zeros(2, size, size)
    masks[0, :, : size // 2], masks[1, :, size // 2 :] = 1, 1
    return {"mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 1])] * 2}


def of_boxes() -> dict[str, list[dict[str, Tensor]]]:
    """Two boxes in either image, which the loss matches with scipy."""
    pytest.importorskip("scipy")
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.4, 0.3]])
    return {"labels": [{"class_labels": torch.tensor([0, 1]), "boxes": boxes}] * 2}


# Of equal numbers, but of tensors that lie elsewhere in memory, for which some kernels add up in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
# Parts that the loss does not depend on: the token of the single mask when a SAM puts out three, SAM 2's score for
# there being an object at all, and what would add an earlier map to the first one.
UNUSED = {
    "SAM": r"output_hypernetworks_mlps\.0\.",
    "SAM 2": r"output_hypernetworks_mlps\.0\.|pred_obj_score_head",
    "DPT": r"fusion_stage\.layers\.0\.residual_layer1\.",
    "Depth Anything": r"fusion_stage\.layers\.0\.residual_layer1\.",
}
TRUTHS: dict[str, Callable] = {
    "SegFormer, segmentation": lambda: of_pixels(32),
    "DPT": lambda: of_pixels(32),
    "Mask2Former": lambda: of_regions(64),
    "EoMT": lambda: of_regions(32),
    "DETR": of_boxes,
    "YOLOS": of_boxes,
}


def loss_of(name: str, model: nn.Module, inputs: dict) -> Tensor:
    """The model's own loss; where it has none, the distance of what it puts out from zero."""
    if name in TRUTHS:
        return model(**inputs, **TRUTHS[name]()).loss
    output = model(**inputs)
    if name.startswith("SAM"):  # the scores of the masks have a head of their own
        return output.pred_masks.square().mean() + output.iou_scores.square().mean()
    return output.predicted_depth.square().mean()


def heads(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in peft_model.named_parameters() if ".modules_to_save.default." in name}


@pytest.mark.parametrize(("name", "config"), ROWS)
def test_the_head_trains_and_comes_back(name: str, config: str, tmp_path) -> None:
    model, inputs = build(ARCHITECTURES[name])
    fresh = copy.deepcopy(model)
    peft_model = get_peft_model(model, eval(config, {"FacTConfig": FacTConfig})).train()
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert heads(peft_model)
    assert set(trained) == {*heads(peft_model), *(name for name in trained if ".factors." in name)}
    before = {name: p.detach().clone() for name, p in trained.items()}

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0)
    for _ in range(2):  # in the first, V = 0 lets no gradient to the other factors
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss_of(name, peft_model, inputs).backward()
        optimizer.step()
    for parameter_name, parameter in trained.items():
        if parameter.ndim > 1:  # the softmax does not care for the bias of keys
            has_gradient = parameter.grad is not None and bool(parameter.grad.any())
            assert has_gradient != bool(re.search(UNUSED.get(name, "nothing"), parameter_name)), parameter_name
            assert torch.equal(parameter, before[parameter_name]) != has_gradient, parameter_name

    peft_model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    expected = peft_model.state_dict()
    assert reloaded.state_dict().keys() == expected.keys()
    for key, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    for got, wanted in zip(outputs(reloaded, inputs), outputs(peft_model, inputs), strict=True):
        torch.testing.assert_close(got, wanted, **ROUNDING)
