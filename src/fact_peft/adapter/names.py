"""Names: which are repositories on the Hub, and how a name that somebody else chose is quoted where it is printed."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a repository on the Hub, and is not a local file or folder."""
    return bool(name) and not Path(str(name)).exists() and is_valid_hub_id(str(name))


def is_valid_hub_id(name: str) -> bool:
    """Whether the Hub allows the name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def mark_local_folder(name: str | None) -> str | None:
    """`name`, with ``./`` in front if it is a relative folder whose name could be mistaken for one on the Hub."""
    if name and not Path(name).is_absolute() and Path(name).exists() and is_valid_hub_id(name):
        return f"./{name}"
    return name


def for_terminal(text: str) -> str:
    """`text` with line breaks, escape sequences and the like escaped as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def for_markdown(text: str) -> str:
    """`text` with every character escaped that has a meaning in Markdown or HTML."""
    text = re.sub(r"[\\`*_{}\[\]()#+!|~$^=:@\"']", r"\\\g<0>", for_terminal(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_code(text: str) -> str:
    """`text` as a code span of Markdown."""
    text = for_terminal(text)
    if not text.strip():
        text = f'"{text}"'  # Markdown has no empty code span
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text[0] == "`" or text[-1] == "`" or text[0] == text[-1] == " " else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def for_python(text: str) -> str:
    """`text` as a Python string literal on one line."""
    return '"' + "".join(f"\\{c}" if c in '"\\' else for_terminal(c) for c in text) + '"'
