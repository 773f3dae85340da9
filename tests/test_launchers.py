"""Two processes on CPU under each configuration of examples/accelerate, against one process.

Each launch runs half of the settings of `benchmarks.launchers`, in which every two choices meet, and then
examples/accelerate_loop.py. The configuration files are as shipped; only the choice of the device is replaced
(benchmarks/launchers/launch_without_gpu.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from backbones import images, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from benchmarks.launchers.launching import (
    LAUNCHERS,
    ROOT,
    commands,
    launch,
    name_of,
    parameters,
    save_backbones,
    train_single,
)
from fact_peft import FacTConfig

# Ranks average gradients of half batches, so sums are rounded in another order: some 1e-7 of values around 1, which the
# AdamW steps carry along: up to 6e-7 seen after ten steps, 1.3e-6 after the loop's fifty. A rank left out or a step
# missed makes an error of the size of the learning rate.
TOLERANCE = {"rtol": 0, "atol": 1e-5}
LEARNING_RATE = 1e-2
LOOP = str(ROOT / "examples" / "accelerate_loop.py")
ADAPTER = "adapter_model.safetensors"

# DDP stands for the others where minutes count.
EACH = [name if name == "ddp" else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS]
SETTINGS = [("vit", "tt", False), ("vit", "tk", True), ("swin", "tt", True), ("swin", "tk", False)]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=[name_of(*setting) for setting in SETTINGS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the single process."""
    pytest.importorskip("sklearn")  # for the data of the loop
    folder = tmp_path_factory.mktemp("launchers")
    save_backbones(folder)
    train_single(folder, SETTINGS)
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = [sys.executable, LOOP, "--mixed_precision", "no", "--epochs", "2", "--output_dir"]
    subprocess.run([*loop, str(folder / "single" / "loop")], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    return folder


@pytest.fixture(scope="module", params=EACH)
def launcher(request: pytest.FixtureRequest, folder: Path) -> str:
    """Name of a launcher after everything ran under it; results in ``folder/<launcher>``."""
    results = folder / request.param
    # What a run killed while writing its checkpoint leaves behind.
    (results / "resumed" / "checkpoint-2.part").mkdir(parents=True)
    loop = [LOOP, "--output_dir"]
    launch(
        request.param,
        [
            *commands(request.param, folder, SETTINGS),
            [*loop, str(results / "loop"), "--epochs", "2", "--mixed_precision", "no"],
            [*loop, str(results / "resumed"), "--epochs", "1", "--mixed_precision", "no"],
            [*loop, str(results / "resumed"), "--epochs", "2", "--mixed_precision", "no"],
            [*loop, str(results / "bf16"), "--epochs", "1", "--decomposition", "tk", "--gradient_checkpointing"],
        ],
    )
    return request.param


@settings
def test_every_rank_ends_with_the_parameters_of_one_process(launcher, folder, setting):
    backbone, decomposition, _ = setting
    (single,) = parameters(folder, "single", name_of(*setting))
    ranks = parameters(folder, launcher, name_of(*setting))
    assert len(ranks) == 2
    start = AutoModelForImageClassification.from_pretrained(folder / backbone)
    torch.manual_seed(0)
    start = get_peft_model(start, FacTConfig(rank=3, decomposition=decomposition, init_weights=False))
    for rank in ranks:
        assert rank.keys() == single.keys()
        for name, parameter in start.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(rank[name], single[name], **TOLERANCE, msg=name)
                # One that never moves must not pass for equal: torch issue 176076, uneven shards on the last rank.
                assert (rank[name] - parameter).abs().max() > LEARNING_RATE, name
            else:
                assert torch.equal(rank[name], parameter), name


@settings
def test_the_saved_adapter_is_whole(launcher, folder, setting):
    backbone = setting[0]
    saved, single = (load_file(folder / where / name_of(*setting) / ADAPTER) for where in (launcher, "single"))
    assert {name: value.shape for name, value in saved.items()} == {name: v.shape for name, v in single.items()}
    with torch.no_grad():
        scores = {
            where: logits(
                PeftModel.from_pretrained(
                    AutoModelForImageClassification.from_pretrained(folder / backbone),
                    folder / where / name_of(*setting),
                ).eval(),
                images(),
            )
            for where in (launcher, "single")
        }
        base = logits(AutoModelForImageClassification.from_pretrained(folder / backbone).eval(), images())
    torch.testing.assert_close(scores[launcher], scores["single"], **TOLERANCE)
    assert (scores[launcher] - base).abs().max() > 0.05


def test_the_loop_gives_the_adapter_of_one_process(launcher, folder):
    saved, single = (load_file(folder / where / "loop" / "adapter" / ADAPTER) for where in (launcher, "single"))
    torch.testing.assert_close(saved, single, **TOLERANCE)


def test_the_resumed_loop_ends_bit_equal(launcher, folder):
    whole, resumed = (load_file(folder / launcher / run / "adapter" / ADAPTER) for run in ("loop", "resumed"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert sorted(path.name for path in (folder / launcher / "resumed").glob("checkpoint*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_checkpoints_hold_no_frozen_weights(launcher, folder):
    checkpoint = folder / launcher / "loop" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    base = (folder / launcher / "loop" / "base" / "model.safetensors").stat().st_size
    # Weights and two moments of 19 KB, and what torch and DeepSpeed write around them.
    assert size < 200_000 < base


def test_bf16_as_in_the_configuration_file_saves_a_float32_adapter(launcher, folder):
    saved = load_file(folder / launcher / "bf16" / "adapter" / ADAPTER)
    factors = {name.rpartition("_")[2]: value for name, value in saved.items() if "fact_" in name}
    assert factors.keys() == {"U", "V", "C", "P"}
    for name, value in saved.items():
        assert value.dtype == torch.float32 and value.isfinite().all(), name
    # P starts at zero; trained in bfloat16 alone its steps would be multiples of 2^-8 of its size.
    assert not torch.equal(factors["P"], factors["P"].bfloat16().float()) and factors["P"].abs().max() > 1e-3


def launched(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of a user, as it is, on a machine without a GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    hidden["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "examples"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, **hidden}, cwd=tmp_path, capture_output=True, text=True)


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
DDP = ("--config_file", str(ROOT / "examples/accelerate/ddp.yaml"), "--main_process_port", "0")


@pytest.mark.slow  # one more launch
def test_two_processes_without_a_gpu_train_as_one_does(folder, tmp_path):
    loop = [LOOP, "--mixed_precision", "no", "--epochs", "2", "--output_dir", str(tmp_path / "loop")]
    done = launched(tmp_path, *LAUNCH, *DDP, *loop)
    assert done.returncode == 0, done.stderr
    saved, single = (load_file(where / "loop" / "adapter" / ADAPTER) for where in (tmp_path, folder / "single"))
    torch.testing.assert_close(saved, single, **TOLERANCE)
    ranks = sorted(path.name for path in (tmp_path / "loop" / "checkpoint-2").glob("rank*.pt"))
    assert ranks == ["rank0.pt", "rank1.pt"]


CONNECTED = (
    "from command_line import *; connect_processes(); from accelerate import *; print(Accelerator().num_processes)"
)
ADVICE = "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2"


@pytest.mark.slow  # four launches
def test_what_cannot_be_launched_without_a_gpu_says_the_line_that_works(tmp_path):
    script = tmp_path / "connected.py"
    script.write_text(CONNECTED)
    sharded = ("--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml"), "--main_process_port", "0")
    refused = launched(tmp_path, *LAUNCH, *sharded, str(script))
    assert refused.returncode != 0 and ADVICE in refused.stderr and refused.stdout.strip() == ""
    alone = launched(tmp_path, *LAUNCH, "--cpu", "--num_processes", "2", str(script))
    assert alone.returncode == 0 and ADVICE in alone.stderr and alone.stdout.split() == ["1"]
    advised = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    together = launched(tmp_path, *advised, str(script))
    assert together.returncode == 0 and "".join(together.stdout.split()) == "22", together.stderr
