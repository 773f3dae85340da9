"""Results of a benchmark as JSON: one record per setting, with what measured it. A setting measured once is kept.

A record is ``{"setting": {...}, "measured": {...}, "provenance": {...}}``. The file is rewritten whole after every
record, through a temporary file, so that an interrupted benchmark loses the setting it was at and nothing else.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "timm")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_hash() -> str | None:
    """The commit of this checkout, with ``-dirty`` behind it if tracked code differs; None outside a checkout.

    Results do not count as code: a benchmark of several files would else call itself dirty from the second on.
    """
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    differs = git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/*/results/*").returncode != 0
    return commit + "-dirty" * differs if commit else None


def hardware() -> str:
    """The accelerator if there is one, else the processor, its cores and the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def provenance() -> dict[str, Any]:
    """Where and with what a number was measured."""
    return {
        "git": git_hash(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
    }


class Results:
    """The records of one benchmark in one file.

    Args:
        file: Where they are kept; read if it exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        self._provenance = provenance()

    def find(self, **setting: Any) -> dict[str, Any] | None:
        """What was measured with exactly this setting; None if nothing was."""
        wanted = json.loads(json.dumps(setting))  # as it reads once it was in the file
        return next((record["measured"] for record in self.records if record["setting"] == wanted), None)

    def add(self, setting: dict[str, Any], measured: dict[str, Any]) -> None:
        """Keep a record, in place of an earlier one of the same setting, and write the file."""
        wanted = json.loads(json.dumps(setting))
        self.records = [record for record in self.records if record["setting"] != wanted]
        self.records.append({"setting": wanted, "measured": measured, "provenance": self._provenance})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.records, indent=1) + "\n")
        part.replace(self.file)

    def frame(self) -> pd.DataFrame:
        """One row per record, one column per field of setting and measurement."""
        return pd.DataFrame([{**record["setting"], **record["measured"]} for record in self.records])
