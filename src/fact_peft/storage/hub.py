"""Names of models: on the Hub, or folders here."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be the name of a repository on the Hub, and is not a file or folder here."""
    return bool(name) and not Path(str(name)).exists() and could_be_hub_id(str(name))


def could_be_hub_id(name: str) -> bool:
    """Whether the Hub allows the name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def with_folders_marked(name: str | None) -> str | None:
    """`name`, or for a folder here a path that cannot be taken for a name on the Hub, also once it is elsewhere."""
    if name and not Path(name).is_absolute() and Path(name).exists() and could_be_hub_id(name):
        return f"./{name}"
    return name
