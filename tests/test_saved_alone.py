"""A backbone saved alone lacks the factors and says so; a model saved whole says nothing, whoever saves it."""

import copy
import warnings

import accelerate
import pytest
import torch
from backbones import make_backbone
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fact_peft import FacTConfig


def adapted(backbone="vit", **settings):
    return get_peft_model(make_backbone(backbone), FacTConfig(rank=4, **settings)).eval()


def injected():
    model = make_backbone("vit")
    model.add_adapter(FacTConfig(rank=4), "default")
    return model


def vit_of(model):
    return (model.get_base_model() if isinstance(model, PeftModel) else model).vit


class Tower(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit


ALONE = {
    "state_dict": lambda vit, folder: torch.save(vit.state_dict(), folder / "backbone.pt"),
    "save_pretrained": lambda vit, folder: vit.save_pretrained(folder),
    "a deep copy": lambda vit, folder: copy.deepcopy(vit).state_dict(),
    "in another model": lambda vit, folder: Tower(vit).state_dict(),
}


@pytest.mark.parametrize(
    "make", [adapted, lambda: adapted(share="block"), lambda: adapted(target_modules=["fc1"]), injected]
)
@pytest.mark.parametrize("way", ALONE)
def test_a_backbone_saved_alone_warns_once(way, make, tmp_path):
    model = make()
    with pytest.warns(UserWarning, match="lacks the factors of adapter 'default', which belong to the whole") as caught:
        ALONE[way](vit_of(model), tmp_path)
    assert len(caught) == 1


def test_each_adapter_is_named():
    model = adapted()
    model.add_adapter("other", FacTConfig(rank=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning) as caught:
        vit_of(model).state_dict()
    assert [name for name in ("default", "other") for entry in caught if repr(name) in str(entry.message)] == [
        "default",
        "other",
    ]


def accelerate_saves(model, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    accelerator.save_model(prepared, folder / "model")


WHOLE = {
    "state_dict": lambda model, folder: model.state_dict(),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "get_peft_model_state_dict": lambda model, folder: get_peft_model_state_dict(model),
    "inside another model": lambda model, folder: Tower(model).state_dict(),
    "a deep copy": lambda model, folder: copy.deepcopy(model).state_dict(),
    "a moving average": lambda model, folder: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "compiled": lambda model, folder: torch.compile(model).state_dict(),
    "accelerate": accelerate_saves,
    "offloaded": lambda model, folder: accelerate.Accelerator(cpu=True).save_model(
        accelerate.cpu_offload(model, execution_device=torch.device("cpu")), folder
    ),
    "a block": lambda model, folder: [block.state_dict() for block in vit_of(model).layers],
}


@pytest.mark.parametrize("make", [adapted, injected])
@pytest.mark.parametrize("way", WHOLE)
def test_a_model_saved_whole_does_not_warn(way, make, tmp_path):
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This state dict")
        WHOLE[way](model, tmp_path)


@pytest.mark.filterwarnings("ignore")  # FSDP1 about a single process; ours is an error below
@pytest.mark.parametrize("shard", ["FSDP1", "FSDP2"])
def test_a_sharded_model_saved_whole_does_not_warn(shard, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted()
        if shard == "FSDP1":
            blocks = {type(vit_of(model).layers[0])}
            wrap = torch.distributed.fsdp.wrap.ModuleWrapPolicy(blocks)
            model = FullyShardedDataParallel(
                model, auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu")
            )
        else:
            mesh = init_device_mesh("cpu", (1,))
            for block in vit_of(model).layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="This state dict")
            assert any("fact_U" in key for key in model.state_dict())
            assert any("fact_U" in key for key in get_model_state_dict(model))
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_left_on_a_model_without_adapters():
    plain = make_backbone("vit")
    for end in ("unload", "merge_and_unload"):
        model = getattr(get_peft_model(copy.deepcopy(plain), FacTConfig(rank=4)), end)()
        assert len(model._state_dict_pre_hooks) == len(plain._state_dict_pre_hooks)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.vit.state_dict()
