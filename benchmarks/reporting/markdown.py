"""Tables in Markdown, and generated text between the markers of a file."""

from collections.abc import Iterable
from pathlib import Path


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Lines of cells, the first column to the left and the others to the right."""
    alignment = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows))


def write_generated(file: Path, command: str, text: str) -> None:
    """Replace what stands in `file` between the markers of `command` by `text`.

    Raises:
        ValueError: If the file has no such markers.
    """
    begin, end = f"<!-- begin: {command} -->", f"<!-- end: {command} -->"
    before, found_begin, rest = file.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{file} needs the lines {begin} and {end}, between which the table goes.")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
