"""Private names of PEFT and transformers: one list, on a page, and an error that says what is gone."""

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


@pytest.mark.parametrize(
    "folder", ["adapter", "architecture", "converters", "operations", "serving", "sharing", "tuner"]
)
def test_no_other_file_imports_a_private_name(folder):
    for file in (Path(upstream.__file__).parent / folder).glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("from peft", "from transformers", "import peft", "import transformers")):
                assert " _" not in line, f"{file.name}: {line}"
