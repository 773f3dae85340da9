"""What the pages say runs: their Python as it stands, block after block, against a Hub on loopback; commands as far as
they can be checked without their data."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import Fork, forking
from hub_server import serve

pytest.importorskip("PIL")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

import pages

PATTERNS = ("*.md", "docs/*.md", "examples/*/README.md", "benchmarks/**/*.md")
FILES = sorted({file for pattern in PATTERNS for file in pages.ROOT.glob(pattern)})
NAMES = [str(file.relative_to(pages.ROOT)) for file in FILES]


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """Runs a page in a process of its own, for which the models that pages name are on the Hub."""
    home = tmp_path_factory.mktemp("home")
    with serve() as hub:
        for name in pages.MODELS:
            pages.save_model(name, home / name)
            hub.repositories[name] = [{file.name: file.read_bytes() for file in (home / name).iterdir()}]
        with forking(home, {**hub.environment(home / "cache"), "MPLBACKEND": "agg"}) as fork:
            yield fork


@pytest.mark.parametrize("name", [name for name in NAMES if pages.program((pages.ROOT / name).read_text())])
def test_what_a_page_says_runs(name: str, fork: Fork, tmp_path: Path) -> None:
    status, output = fork(pages.program((pages.ROOT / name).read_text()), tmp_path, name)
    assert status == 0, output


@pytest.mark.parametrize("model", ["me/dinov2-small-float16", pages.TIMM])
def test_start_here_runs_on_a_float16_checkpoint_and_on_timm(model: str, fork: Fork, tmp_path: Path) -> None:
    page = (pages.ROOT / "docs" / "index.md").read_text()
    named = 'name = "google/vit-base-patch16-224"'
    assert named in page
    status, output = fork(pages.program(page.replace(named, f"name = {model!r}")), tmp_path)
    assert status == 0, output
    losses = [float(loss) for loss in re.findall(r"^[0-4] (\S+)$", output, re.M)]
    assert len(losses) == 5 and losses[-1] < losses[0], output  # NaN is not less


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_what_it_is_written_in(name: str) -> None:
    languages = {language for _, language, _ in pages.blocks((pages.ROOT / name).read_text())}
    assert languages <= pages.LANGUAGES, "a block of none of these languages is not executed"


def test_links_of_the_readme_lead_to_files() -> None:
    """Sphinx checks the other pages when it builds the site, and that the page of the API has every public name."""
    text = re.sub(r"```.*?```|`[^`]*`", "", (pages.ROOT / "README.md").read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)
    assert links and [link for link in links if not (pages.ROOT / link).is_file()] == []


PAGE = """# Title

```python
number = {}
```

and

```bash
python -m fact_peft.{} --option
```
"""


def test_a_program_has_the_lines_of_its_page() -> None:
    lines = pages.program(PAGE.format(1, "none")).splitlines()
    assert [index for index, line in enumerate(lines) if line] == [0, 3, 8]


def test_a_page_whose_code_is_wrong_fails_at_its_line(fork: Fork, tmp_path: Path) -> None:
    status, output = fork(pages.program(PAGE.format("1 / 0", "none")), tmp_path, "PAGE.md")
    assert status == 1
    assert 'File "PAGE.md", line 4' in output
    assert "ZeroDivisionError" in output


@pytest.mark.parametrize(
    "command",
    [
        "python -m benchmarks.bytes.parameter_counts --no_such_option",
        "accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_loop.py --ranks 3",
        "accelerate launch --config_file examples/accelerate/none.yaml examples/accelerate_loop.py",
        'pip install ".[no-such-extra]"',
        "pip install no-such-package",
        "rm -rf outputs",
        "OMP_NUM_THREADS=1 python -m fact_peft no-such-adapter",
    ],
)
def test_a_page_whose_command_is_wrong_fails(command: str, fork: Fork, tmp_path: Path) -> None:
    status, output = fork(pages.program(f"# Title\n```bash\n{command}\n```\n"), tmp_path)
    assert status == 1, output
