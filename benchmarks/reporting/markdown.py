"""Puts generated text between the markers of a Markdown file."""

from pathlib import Path


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
