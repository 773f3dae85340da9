"""Some sequences of verbs, always the same ones; ``python -m tests.fuzzing --sequences 10000`` runs others."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzzing.surfaces import InjectedSurfaces, PeftSurfaces


@pytest.mark.parametrize("machine", [PeftSurfaces, InjectedSurfaces])
def test_any_sequence_of_verbs_gives_what_plain_matrices_say(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
