"""Training that is killed and started again, against training that is not.

    python -m benchmarks.interruption

runs examples/image_classification.py once in peace. Then it starts the same run, kills it with SIGKILL while a
checkpoint is being written or at a random later moment, starts it again, and so on until it ends. It prints where each
attempt went on, the largest difference of the factors and the head at the end, and the sizes of what lies on disk.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from benchmarks.interruption.killing import (
    largest_difference,
    newest_checkpoint,
    run,
    run_and_kill,
    sizes,
    whole_checkpoints,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="how often to kill the run (default: 4)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs, a checkpoint each (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    print(f"| decomposition | killed | at checkpoint | whole ones | largest difference at the end |\n|{'---|' * 5}")
    with tempfile.TemporaryDirectory() as name:
        for decomposition in ("tt", "tk"):
            options = ["--num_train_epochs", str(arguments.epochs), "--decomposition", decomposition]
            peaceful, killed = Path(name, decomposition, "peaceful"), Path(name, decomposition, "killed")
            run(peaceful, options)
            killed.mkdir(parents=True)
            shutil.copytree(peaceful / "backbone", killed / "backbone")
            for kill in range(arguments.kills):
                delay = 0.0 if kill % 2 == 0 else moments.uniform(0, 0.5)
                step = run_and_kill(killed, options, delay)
                when = "as it appears" if delay == 0 else f"{delay:.2f} s later"
                print(f"| {decomposition} | {when} | {step} | {whole_checkpoints(killed)} | |", flush=True)
            run(killed, options)
            print(f"| {decomposition} | - | | | {largest_difference(peaceful, killed):.1e} |", flush=True)
        checkpoint = peaceful / f"checkpoint-{newest_checkpoint(peaceful)}"
        print(f"\n{checkpoint.name}, bytes: {json.dumps(sizes(checkpoint))}")
        print(f"finished adapter, bytes: {json.dumps(sizes(peaceful))}")


if __name__ == "__main__":
    main()
