"""Any JSON in any field of a config: an ordinary config that comes back equal from disk, or an error with its name."""

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path

import pytest
from peft import PeftConfig

from fact_peft import FacTConfig

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

FIELDS = sorted(
    field.name for field in dataclasses.fields(FacTConfig) if field.name not in ("peft_type", "peft_version")
)
# Beside anything at all, what looks right: only that gets past the first check.
LIKELY = st.sampled_from(
    ["tt", "tk", "all", "fact_only", "none", "orthogonal", "all-linear", "q_proj", ".*fc1", "(", "*", "", ".", "\\"]
) | st.sampled_from([0, 1, -1, 8, 0.5, 1e308, -1e-310, 10**400, "vit.layers.0-1: q 8x8", "0-99999999: q 8x8", "q 0x0"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | LIKELY,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | LIKELY.map(str), inner, max_size=2)
    ),
    max_leaves=5,
)
bounded = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def equal(one: FacTConfig, other: FacTConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in FIELDS)


def is_named(name: str, error: Exception) -> bool:
    """Whether an error says which field it is about; PEFT calls ``task_type`` a "task type"."""
    return name in str(error) or name.replace("_", " ") in str(error)


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_is_taken_as_it_is_or_refused_by_name(name):
    @bounded
    @example(10**400)
    @example([[]])
    @example({"": {}})
    @given(JSON)
    def check(value):
        base = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
        try:
            config = FacTConfig(**base, **{name: value})
        except (ValueError, TypeError) as error:
            config = None
            assert is_named(name, error), f"{error!r} does not name {name}"
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Path(folder, "adapter_config.json")
            file.write_text(json.dumps({"peft_type": "FACT", **base, name: value}))
            for read in (FacTConfig.from_pretrained, PeftConfig.from_pretrained):
                try:
                    read_back = read(folder)
                except (ValueError, TypeError) as error:
                    assert config is None and is_named(name, error), f"{error!r} does not name {name}"
                else:
                    assert config is not None and equal(read_back, config)
            if config is not None:
                config.save_pretrained(folder)
                assert equal(FacTConfig.from_pretrained(folder), config)
                json.loads(file.read_text())

    check()
