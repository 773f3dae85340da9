"""A model that was sharded before it was adapted is refused by name: each rank would train an adapter of its own."""

import pytest
import torch
from backbones import make_backbone
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fact_peft import FacTConfig


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def by_fsdp(model, mesh):
    fully_shard(model, mesh=mesh)


def by_tensor_parallelism(model, mesh):
    layer = model.vit.layers[0].mlp.fc1
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))


@pytest.mark.parametrize("shard", [by_fsdp, by_tensor_parallelism])
def test_a_sharded_model_is_refused_and_stays_as_it_was(shard, mesh, tmp_path):
    get_peft_model(make_backbone("vit"), FacTConfig(rank=4)).save_pretrained(tmp_path)
    model = make_backbone("vit")
    shard(model, mesh)
    names = list(model.state_dict())
    for adapt in (
        lambda: get_peft_model(model, FacTConfig(rank=4)),
        lambda: inject_adapter_in_model(FacTConfig(rank=4), model),
        lambda: PeftModel.from_pretrained(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"is already sharded over processes .* adapter first"):
            adapt()
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_a_second_adapter_is_refused_once_the_first_is_sharded(mesh):
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=4))
    by_fsdp(model, mesh)
    with pytest.raises(ValueError, match="is already sharded over processes"):
        model.add_adapter("other", FacTConfig(rank=2))
    assert list(model.peft_config) == ["default"]
    model(torch.zeros(1, 3, 16, 16)).logits.sum().backward()
