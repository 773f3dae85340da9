"""The list of adapters that the service has, in one file that every replica reads.

    STATE/backbone.txt          the model that these adapters belong to
    STATE/manifest.json         {"digits": {"files": "5f0c...", "source": "digits"}, ...}
    STATE/files/5f0c.../        a copy of the adapter's files, under a name computed from their contents

A folder of files never changes, since a new version of an adapter is another folder. So every replica that reads the
manifest, also after a restart, loads the same bytes, even if the original files have changed. On a cluster STATE must
be on a file system that all machines share.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PROCESSOR_FILE = "preprocessor_config.json"


class Entry(NamedTuple):
    files: str  # name of the folder in STATE/files
    source: str  # where it came from, for display


class Catalogue:
    """The adapters in the folder `state`. Writers in all processes exclude each other; readers never wait."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.manifest = state / "manifest.json"
        (state / "files").mkdir(parents=True, exist_ok=True)

    def claim(self, backbone: str) -> None:
        """Record the model that the adapters are for, or check that it is the recorded one.

        Raises:
            ValueError: If another model was recorded.
        """
        file = self.state / "backbone.txt"
        if not file.exists():
            file.write_text(backbone)
        elif file.read_text() != backbone:
            raise ValueError(
                f"{self.state} holds adapters of the backbone {file.read_text()!r}, not of {backbone!r}. Pass another "
                f"folder as --state, or, if this is the same model in another place, delete {file}."
            )

    def stamp(self) -> tuple[int, int] | None:
        """A value that differs after every change; None before the first one."""
        try:
            status = self.manifest.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def read(self) -> dict[str, Entry]:
        try:
            text = self.manifest.read_text()
        except FileNotFoundError:
            return {}
        return {name: Entry(**entry) for name, entry in json.loads(text).items()}

    def folder(self, entry: Entry) -> Path:
        return self.state / "files" / entry.files

    def put(self, name: str, adapter: Path, source: str, check: Callable[[Path], object] = bool) -> Entry:
        """Copy the adapter's files and record it under `name`, in place of an earlier adapter.

        If `check` raises an exception for the copy, nothing changes.
        """
        with self._writing():
            entries = self.read()
            entries[name] = Entry(self._copy(adapter), source)
            try:
                check(self.folder(entries[name]))
                self._write(entries)
            finally:
                self._sweep()
            return entries[name]

    def remove(self, name: str) -> None:
        """Remove an adapter and its files.

        Raises:
            KeyError: If there is none of this name.
        """
        with self._writing():
            entries = self.read()
            del entries[name]
            self._write(entries)
            self._sweep()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with open(self.state / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _copy(self, adapter: Path) -> str:
        """Copy only the files that an adapter consists of, which are data: safetensors and JSON."""
        part = self.state / "files" / f".{uuid4().hex}"
        part.mkdir()
        digest = hashlib.sha256()
        for file in (*ADAPTER_FILES, PROCESSOR_FILE):
            if (adapter / file).is_file() or file in ADAPTER_FILES:
                shutil.copyfile(adapter / file, part / file)
                content = (part / file).read_bytes()
                digest.update(f"{file} {len(content)}\n".encode() + content)
        name = digest.hexdigest()[:32]
        if not (self.state / "files" / name).exists():
            part.rename(self.state / "files" / name)
        return name

    def _write(self, entries: dict[str, Entry]) -> None:
        part = self.manifest.with_suffix(".part")
        with open(part, "w") as file:
            json.dump({name: entry._asdict() for name, entry in sorted(entries.items())}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.manifest)

    def _sweep(self) -> None:
        """Delete the files that no entry uses any more."""
        used = {entry.files for entry in self.read().values()}
        for folder in (self.state / "files").iterdir():
            if folder.name not in used:
                shutil.rmtree(folder)
