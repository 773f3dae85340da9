"""Checkpointing under DDP: the replicas stay equal, or training stops before they differ."""

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import LoraConfig, get_peft_model
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from fact_peft import FacTConfig

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
CONFIGS = {
    "FacT": lambda: FacTConfig(rank=4, init_weights=False),
    "LoRA": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=LAYERS, modules_to_save=["classifier"]),
}
REFUSED = "Reentrant activation checkpointing under DistributedDataParallel"

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*static_graph:UserWarning"),
]


def checkpointed(method, use_reentrant):
    model = make_backbone("vit")
    torch.manual_seed(0)
    model = get_peft_model(model, CONFIGS[method]()).train()
    base = model.get_base_model()
    # Newer versions of transformers have another name for it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    base.vit.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def train(model, seed=0, steps=2):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + seed)
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        nn.functional.cross_entropy(logits(model, pixels), torch.arange(3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(parameters).detach()


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_reentrant_checkpointing_under_ddp_is_refused_by_name(process_group):
    model = DistributedDataParallel(checkpointed("FacT", use_reentrant=True))
    with pytest.raises(RuntimeError, match=REFUSED):
        train(model)


def test_what_is_right_is_not_refused(process_group):
    expected = train(checkpointed("FacT", use_reentrant=False))
    for use_reentrant, wrap in [
        (True, lambda model: model),
        (False, DistributedDataParallel),
        (True, lambda model: DistributedDataParallel(model, static_graph=True)),
    ]:
        torch.testing.assert_close(train(wrap(checkpointed("FacT", use_reentrant))), expected)


def test_a_forward_pass_without_gradients_is_not_refused(process_group):
    model = checkpointed("FacT", use_reentrant=False)
    wrapped = DistributedDataParallel(model)
    with torch.no_grad():
        logits(wrapped, images())
    train(wrapped)


def in_process(rank, folder, method, use_reentrant, static_graph):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = DistributedDataParallel(checkpointed(method, use_reentrant), static_graph=static_graph)
    torch.save(train(model, seed=rank), f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, use_reentrant, static_graph",
    [("LoRA", True, False), ("FacT", False, False), ("FacT", True, True)],
)
def test_two_replicas_stay_equal(method, use_reentrant, static_graph, tmp_path):
    multiprocessing.spawn(in_process, (str(tmp_path), method, use_reentrant, static_graph), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert torch.equal(first, second)
