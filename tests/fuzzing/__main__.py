"""Many sequences of verbs, compared after each with plain matrices: ``python -m tests.fuzzing --sequences 5000``.

Prints the seeds, how often each verb ran, and every sequence that failed.
"""

import argparse
import logging
import time
import traceback

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzzing.surfaces import InjectedSurfaces, PeftSurfaces
from tests.fuzzing.verbs import COUNTS, Verbs

AT_A_TIME = 100


def run(machine: type[Verbs], first_seed: int, num_sequences: int, steps: int) -> list[int]:
    """Run in portions of one seed each; return the seeds of those that failed."""
    failed = []
    for number in range(first_seed, first_seed + num_sequences // AT_A_TIME):
        seeded = seed(number)(type(machine.__name__, (machine,), {}))
        try:
            run_state_machine_as_test(
                seeded,
                settings=settings(
                    max_examples=AT_A_TIME,
                    stateful_step_count=steps,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate],
                    report_multiple_bugs=False,
                ),
            )
        except Exception as error:
            failed.append(number)
            print(f"\n{machine.__name__}, seed {number}:")
            traceback.print_exc(limit=-2)
            print("\n".join(getattr(error, "__notes__", [])), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.partition(":")[0])
    parser.add_argument("--sequences", type=int, default=1000, help="in all, half of them through each surface")
    parser.add_argument("--steps", type=int, default=20, help="verbs in a sequence, at most")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each is good for 100 sequences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    each = arguments.sequences // 2 // AT_A_TIME * AT_A_TIME
    last_seed = arguments.seed + each // AT_A_TIME - 1
    for machine in (PeftSurfaces, InjectedSurfaces):
        failed = run(machine, arguments.seed, each, arguments.steps)
        print(f"{machine.__name__}: seeds {arguments.seed} to {last_seed}, failed: {failed or 'none'}", flush=True)
    for name, count in sorted(COUNTS.items()):
        print(f"{count:8,} {name}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
