"""Files of an adapter folder replaced together: whatever stops the process, the folder is the old one or the new one.

Every file is replaced by a rename, so none is ever cut off. Several cannot be renamed at once. So the new files are
first written whole into the subfolder `PENDING`, with a record of what they replace; then one rename decides: that of
``adapter_config.json``, or of the subfolder itself if the config stays as it is. Then the others follow. If the process
is stopped between, whoever reads the config next finishes the work, see `finish_replacing`, which PEFT's and
transformers' loaders call through `registration.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME

INCOMING, PENDING, RECORD = ".incoming", ".pending", "replaces.json"


@contextmanager
def replacing_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files into; when the block ends, they replace those of their names in `folder`, together.

    If it ends with an exception, such as of a full disk, `folder` stays as it was.
    """
    incoming = Path(folder, INCOMING)
    shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed
    incoming.mkdir(parents=True)
    try:
        yield incoming
        replace_files(Path(folder), incoming)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def replace_files(folder: Path, incoming: Path) -> None:
    """Let the files of `incoming`, a folder on the same disk, replace those of their names in `folder`, together."""
    finish_replacing(folder)
    shutil.rmtree(folder / PENDING, ignore_errors=True)
    new = {path.name: digest(path) for path in sorted(incoming.iterdir()) if path.is_file()}
    changed = {name: digest(folder / name) for name in new if digest(folder / name) != new[name]}
    for name in changed:
        flush(incoming / name)
    if len(changed) == 1:
        (name,) = changed
        os.replace(incoming / name, folder / name)
    elif changed:
        others = {name: old for name, old in changed.items() if name != CONFIG_NAME}
        record = {"config": new.get(CONFIG_NAME, digest(folder / CONFIG_NAME)), "replaces": others}
        (incoming / RECORD).write_text(json.dumps(record))
        flush(incoming / RECORD)
        flush(incoming)
        os.replace(incoming, folder / PENDING)
        flush(folder)
        if CONFIG_NAME in changed:
            os.replace(folder / PENDING / CONFIG_NAME, folder / CONFIG_NAME)
            flush(folder)
        finish_replacing(folder)
    flush(folder)


def finish_replacing(folder: Path) -> None:
    """Finish what a process that was stopped has decided; nothing to do for a folder where none was.

    A file that somebody has written since is left as it is.

    Raises:
        ValueError: If the files cannot be moved, as on a read-only disk: the folder may then hold the new config beside
            the old weights.
    """
    pending = folder / PENDING
    try:
        record = json.loads((pending / RECORD).read_text())
        config, replaces = record["config"], dict(record["replaces"])
    except (OSError, ValueError, TypeError, KeyError):  # none, or one that this file did not write
        return
    if digest(folder / CONFIG_NAME) != config:
        return  # not decided: the folder is the old one
    for name, old in replaces.items():
        if Path(name).name == name and (pending / name).is_file() and digest(folder / name) == old:
            try:
                os.replace(pending / name, folder / name)
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                raise ValueError(
                    f"A save into {folder} was interrupted and cannot be finished ({error}): its config is new and "
                    f"{name} is old. Load it once where the folder can be written, or move the files of {pending} "
                    "one level up."
                ) from error
    flush(folder)
    shutil.rmtree(pending, ignore_errors=True)


def digest(file: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself; Windows cannot do the latter."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
