"""Many sequences of verbs, compared after each with plain matrices: ``python -m tests.fuzzing --sequences 10000``.

Prints every seed when it is done, every sequence that failed, and how often each verb ran. Each seed gives a hundred
sequences through each of two surfaces, so that a run can be split or continued: the sequences of
``--sequences 10000 --seed 0`` are those of ``--sequences 4000 --seed 0`` and ``--sequences 6000 --seed 20``.
"""

import argparse
import logging
import time
import traceback

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test
from transformers.utils import logging as transformers_logging

from tests.fuzzing.surfaces import InjectedSurfaces, PeftSurfaces
from tests.fuzzing.verbs import COUNTS, Verbs

AT_A_TIME = 100


class Independent(HypothesisProvider):
    """Draws every sequence anew; hypothesis itself makes four of five by changing an earlier one in a place or two."""


AVAILABLE_PROVIDERS["independent"] = f"{__name__}.Independent"


def run(machine: type[Verbs], number: int, steps: int) -> bool:
    """Run the sequences of one seed until one fails; return whether none did."""
    seeded = seed(number)(type(machine.__name__, (machine,), {}))
    before, start = COUNTS["sequences"], time.process_time()
    failed = False
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
                backend="independent",
            ),
        )
    except Exception as error:
        failed = True
        traceback.print_exc(limit=-2)
        print("\n".join(getattr(error, "__notes__", [])))
    count, seconds, outcome = COUNTS["sequences"] - before, time.process_time() - start, "FAILED" if failed else "held"
    print(f"{machine.__name__}, seed {number}: {count} sequences {outcome}, {seconds:.0f} s of CPU time", flush=True)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.partition(":")[0])
    parser.add_argument("--sequences", type=int, default=1000, help="in all, half of them through each surface")
    parser.add_argument("--steps", type=int, default=12, help="verbs in a sequence, at most")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each is good for 100 sequences a surface")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    last = arguments.seed + max(1, arguments.sequences // (2 * AT_A_TIME))
    failed = []
    try:
        for number in range(arguments.seed, last):
            for machine in (PeftSurfaces, InjectedSurfaces):
                if not run(machine, number, arguments.steps):
                    failed.append(f"{machine.__name__} {number}")
    finally:  # also when interrupted
        for name, count in sorted(COUNTS.items()):
            print(f"{count:8,} {name}")
        print(f"Seeds {arguments.seed} to {last - 1}, {time.perf_counter() - start:.0f} s; failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
