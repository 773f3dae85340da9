"""How far distributed training ends from training in one process, with 2 processes on CPU.

    python -m benchmarks.launchers

Trains tiny backbones for ten AdamW steps on the same global batches: once in a single process, then under
`accelerate launch` with each configuration file of `examples/accelerate`. The table has the largest absolute difference
of a factor from the single process, over all factors and all ranks.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.launchers.launching import (
    LAUNCHERS,
    SETTINGS,
    commands,
    largest_difference,
    launch,
    name_of,
    save_backbones,
    train_single,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_backbones(folder)
        train_single(folder)
        print("| launcher | backbone | decomposition | checkpointing | largest difference |\n|---|---|---|---|---|")
        for launcher in arguments.launchers:
            launch(launcher, commands(launcher, folder))
            for setting in SETTINGS:
                backbone, decomposition, checkpointing = setting
                difference = largest_difference(folder, launcher, name_of(*setting))
                cells = (launcher, backbone, decomposition, "yes" if checkpointing else "no", f"{difference:.1e}")
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
