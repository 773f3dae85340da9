"""Runs scripts under `accelerate launch` on CPUs, whatever GPU launcher the configuration file names.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml \
        benchmarks/launchers/launch_without_gpu.py SCRIPT ARGUMENT ... --then SCRIPT ARGUMENT ...

For tests. Accelerate starts FSDP and DeepSpeed on GPUs only; without one it falls back, silently, to something else or
to processes that know nothing of each other. This replaces the one method that decides so (accelerate 1.15). Several
scripts share one launch, since importing the libraries takes longer than running them.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch  # after the accelerators were chosen
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState


def prepare_backend(*args: object, **kwargs: object) -> tuple[str, DistributedType]:
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU


def main() -> None:
    PartialState._prepare_backend = prepare_backend
    torch.set_num_threads(1)
    commands: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        if argument == "--then":
            commands.append([])
        else:
            commands[-1].append(argument)
    for command in commands:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
    torch.distributed.barrier()  # one that leaves while another still saves was seen to abort, once in many runs
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
