"""Private names of PEFT and transformers: one list, on a page, and an error that says what is gone."""

import importlib
from pathlib import Path

import pytest

from fact_peft import upstream


def test_the_page_lists_what_is_used():
    page = (Path(__file__).parent.parent / "docs" / "upstream.md").read_text()
    assert upstream.table() in page


def test_a_name_that_is_gone_is_named_with_the_version(monkeypatch):
    monkeypatch.setattr(upstream, "USED", {})
    with pytest.raises(ImportError, match=r"needs peft\.tuners\.gone, which peft [0-9.]+ does not have \(to test\)"):
        upstream.private("peft.tuners:gone", "to test")


def test_overridden_private_methods_are_listed():
    """Those of peft in all classes of the tuner. If PEFT renamed one, nothing would call ours."""
    listed = {name.rsplit(".", 1)[1] for name in upstream.USED}
    found = set()
    for file in (Path(upstream.__file__).parent / "tuner").glob("[a-z]*.py"):
        for cls in vars(importlib.import_module(f"fact_peft.tuner.{file.stem}")).values():
            if isinstance(cls, type) and cls.__module__ == f"fact_peft.tuner.{file.stem}":
                theirs = {name for base in cls.__mro__ if base.__module__.startswith("peft.") for name in vars(base)}
                found |= {name for name in vars(cls) if name[0] == "_" and name[1] != "_"} & theirs - {"_abc_impl"}
    assert "_create_and_replace" in found and found <= listed


@pytest.mark.parametrize(
    "folder", ["adapter", "architecture", "converters", "operations", "serving", "sharing", "tuner"]
)
def test_no_other_file_imports_a_private_name(folder):
    for file in (Path(upstream.__file__).parent / folder).glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("from peft", "from transformers", "import peft", "import transformers")):
                assert " _" not in line, f"{file.name}: {line}"
