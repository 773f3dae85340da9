"""Optimizer groups: every trained parameter once, each kind at its rate."""

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from fact_peft import FacTConfig, parameter_groups


def adapted(**settings):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    return get_peft_model(ViTForImageClassification(config), FacTConfig(rank=2, **settings))


@pytest.mark.parametrize("decomposition", ["tt", "tk", "cp"])
def test_every_trained_parameter_is_in_one_group_at_its_rate(decomposition):
    model = adapted(decomposition=decomposition, bias="fact_only")
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = {group["name"]: group for group in parameter_groups(model, 4e-3, shared_lr_ratio=0.5, head_lr=1e-2)}
    assert {name: group["lr"] for name, group in groups.items()} == {"shared": 2e-3, "cores": 4e-3, "rest": 1e-2}
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    of = {kind: [names[id(parameter)] for parameter in groups[kind]["params"]] for kind in groups}
    assert of["shared"] and all(".fact_U." in name or ".fact_V." in name for name in of["shared"])
    assert of["cores"] and all(".fact_" in name and name not in of["shared"] for name in of["cores"])
    assert any("classifier" in name for name in of["rest"]) and any(name.endswith("bias") for name in of["rest"])
    torch.optim.AdamW(list(groups.values())).step()


def test_a_step_moves_what_is_shared_less():
    model = adapted(init_weights=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, shared_lr_ratio=0.25), weight_decay=0)
    model(pixel_values=torch.randn(4, 3, 16, 16), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert max(size for name, size in moved.items() if ".fact_U." in name) == pytest.approx(2.5e-4, rel=1e-2)
    assert max(size for name, size in moved.items() if ".fact_Sigma." in name) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("start", "shared"), [(True, 1e-3), ("orthogonal", 4e-3)])
def test_the_ratio_follows_from_the_start(start, shared):
    rates = {group["name"]: group["lr"] for group in parameter_groups(adapted(init_weights=start), 4e-3)}
    assert rates == {"shared": shared, "cores": 4e-3, "rest": 4e-3}


@pytest.mark.parametrize(
    ("arguments", "named"), [({"lr": 0.0}, "lr=0.0"), ({"lr": 1.0, "shared_lr_ratio": -1}, "shared_lr_ratio=-1"),
                             ({"lr": 1.0, "head_lr": float("nan")}, "head_lr=nan")]
)  # fmt: skip
def test_rates_that_are_none_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        parameter_groups(adapted(), **arguments)


def test_cores_may_be_trained_alone():
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".fact_U." in name or ".fact_V." in name:
            parameter.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, 4e-3)] == ["cores", "rest"]


def test_a_model_that_trains_no_factor_is_refused():
    with pytest.raises(ValueError, match="trains no factor"):
        parameter_groups(adapted(inference_mode=True), 1e-3)
