"""Ten steps of training under whatever launcher started this, and all parameters of every rank after them.

Run by `benchmarks.launchers`; an ordinary training script but for the checks that it really is distributed.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageClassification

from fact_peft import FacTConfig

STEPS = 10
GLOBAL_BATCH = 8
NUM_LABELS = 5
TYPES = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


class RandomImages(Dataset):
    """The same images in every process."""

    def __len__(self) -> int:
        return STEPS * GLOBAL_BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % NUM_LABELS}


def check_distributed(launcher: str, accelerator: Accelerator, model: nn.Module) -> None:
    """Several ways to launch leave every process on its own, or its parameters whole, and say nothing."""
    assert accelerator.distributed_type == TYPES[launcher], accelerator.distributed_type
    assert accelerator.num_processes == (1 if launcher == "single" else 2), accelerator.num_processes
    factors = {name: p for name, p in model.named_parameters() if ".fact_" in name}
    for name, factor in factors.items():
        if launcher == "fsdp2":
            assert isinstance(factor, DTensor) and factor.to_local().numel() < factor.numel(), name
        if launcher == "zero3":
            assert factor.numel() == 0 and 0 < factor.ds_tensor.numel() < factor.ds_numel, name
    assert factors


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter with all that the other ranks have of it; called on all ranks."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().clone()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def train(launcher: str, backbone: Path, decomposition: str, checkpointing: bool, folder: Path) -> None:
    """Train and write into `folder` the adapter and, for each rank, ``rank<n>.safetensors`` with all parameters."""
    accelerator = Accelerator(mixed_precision="no", cpu=launcher == "single")
    if launcher == "zero3":
        # Parameters below the threshold, by default 100,000 numbers, would stay whole.
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    model = AutoModelForImageClassification.from_pretrained(backbone)
    if launcher == "zero3":
        assert all(parameter.numel() == 0 for parameter in model.parameters())  # FacT sees a model without shapes
    torch.manual_seed(0)
    model = get_peft_model(model, FacTConfig(rank=3, decomposition=decomposition, init_weights=False))
    # accelerate 1.15 makes the patch embedding an FSDP2 unit of its own, which cannot lie inside another one.
    model._no_split_modules = [name for name in model._no_split_modules if not name.endswith("Embeddings")]
    if checkpointing:
        # Newer versions of transformers have another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=1e-4)
    images = DataLoader(RandomImages(), batch_size=GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, images = accelerator.prepare(model, optimizer, images)
    check_distributed(launcher, accelerator, model)
    for batch in images:
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
    check_distributed(launcher, accelerator, model)
    adapted = accelerator.unwrap_model(model)
    assert isinstance(adapted, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: whole(parameter) for name, parameter in adapted.named_parameters()}
    save_file(parameters, folder / f"rank{accelerator.process_index}.safetensors")
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        adapted.save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launcher", choices=TYPES, help="what this is expected to run under")
    parser.add_argument("backbone", type=Path, help="folder of the model to adapt")
    parser.add_argument("decomposition", choices=["tt", "tk"])
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--checkpointing", action="store_true", help="non-reentrant gradient checkpointing")
    arguments = parser.parse_args()
    train(
        arguments.launcher,
        arguments.backbone,
        arguments.decomposition,
        arguments.checkpointing,
        arguments.folder,
    )


if __name__ == "__main__":
    main()
