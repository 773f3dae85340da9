"""Training checkpoints that hold the trained weights and no frozen ones, under every launcher of accelerate.

accelerator.save_state would write the whole backbone into each checkpoint. Call all functions on all ranks.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp

TRAINED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the optimizer. Only its own functions can save what it shards."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def trained_weights(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    """Factors and head by name, unsharded and in float32; other ranks than the main process may get less."""
    if not uses_deepspeed(accelerator):
        return dcp.get_model_state_dict(model, options=TRAINED)
    from deepspeed.utils import safe_get_full_fp32_param

    named = model.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).cpu() for name, p in named if p.requires_grad}


def trained_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_checkpoint(folder: Path, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Write into ``<folder>.part`` and rename it at the end, so that every ``<folder>`` is a complete checkpoint."""
    part = folder.with_suffix(".part")
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if uses_deepspeed(accelerator):
        model.save_checkpoint(part, "deepspeed", exclude_frozen_parameters=True)
    else:
        state = dcp.get_state_dict(model, optimizer.optimizer, options=TRAINED)
        if accelerator.is_main_process:
            torch.save(state, part / "state.pt")
    own = (trained_names(model), scheduler.state_dict(), torch.get_rng_state(), torch.cuda.get_rng_state_all())
    torch.save(own, part / f"rank{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part.rename(folder)


def load_checkpoint(folder: Path, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Restore a checkpoint, under the launcher and the number of processes that saved it.

    Raises:
        ValueError: If it has the weights of another model.
    """
    names, schedule, cpu, gpus = torch.load(folder / f"rank{accelerator.process_index}.pt")
    if names != trained_names(model):
        raise ValueError(
            f"{folder} has the weights of a model with other arguments; give this run an --output_dir of its own."
        )
    if uses_deepspeed(accelerator):
        model.load_checkpoint(folder, "deepspeed", load_module_strict=False)
    else:
        weights, moments = torch.load(folder / "state.pt")
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)
        dcp.set_state_dict(
            model, optimizer.optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
        )
    scheduler.load_state_dict(schedule)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus)


def last_epoch(folder: Path) -> int:
    """The epoch of the last complete ``checkpoint-<epoch>`` in `folder`; 0 if there is none."""
    return max((int(file.name.rpartition("-")[2]) for file in folder.glob("checkpoint-*[0-9]")), default=0)
