"""The commands that print the numbers of the docs."""

import subprocess
import sys

import pytest

from benchmarks import features


@pytest.mark.parametrize("feature", features.FEATURES.values(), ids=features.FEATURES)
@pytest.mark.filterwarnings("ignore")  # torchao and transformers about their own deprecations
def test_fact_has_every_feature_of_the_table(feature):
    feature("FacT")


@pytest.mark.parametrize(
    "command, expected",
    [
        (["benchmarks/exactness.py", "--rank", "2"], "| float64 | q, k, v, o | tt |"),
        (["benchmarks/parameter_counts.py"], "| ViT-B/16 | FacT-TT | 4 | 8,448 | 8,448 | 33,792 |"),
    ],
)
def test_commands_print_their_tables(command, expected):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
