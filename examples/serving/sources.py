"""Where PUT may take an adapter from: one folder of this machine, and Hub owners that were named at the start."""

import json
import re
from pathlib import Path

from catalogue import ADAPTER_FILES, PROCESSOR_FILE
from huggingface_hub import snapshot_download
from pydantic import BaseModel, ValidationError
from validation import Refused

MAX_SOURCE_BYTES = 10_000
HUB_ID = re.compile(r"([\w.-]+)/[\w.-]+")


class Source(BaseModel):
    """Body of PUT: one of both, with a branch, tag or commit of a repository on the Hub."""

    folder: str | None = None
    hub: str | None = None
    revision: str | None = None


def check_source(body: bytes) -> Source:
    try:
        source = Source.model_validate_json(body)
    except ValidationError as error:
        raise Refused(422, f"The body does not say where the adapter lies: {error.errors()[0]['msg']}.") from error
    if (source.folder is None) == (source.hub is None):
        raise Refused(422, 'Say where the adapter lies: {"folder": "NAME"} or {"hub": "OWNER/NAME"}.')
    return source


def from_folder(name: str, allowed: Path) -> tuple[Path, str]:
    """A folder below `allowed`, links followed, and what to call it."""
    folder = (allowed / name).resolve()
    if allowed.resolve() not in folder.parents:
        raise Refused(403, f"folder={name!r} is not inside the folder of adapters that this service loads from.")
    if not folder.is_dir():
        raise Refused(404, f"folder={name!r} is not there, in the folder of adapters that this service loads from.")
    return checked(folder, name), name


def from_hub(repo_id: str, revision: str | None, owners: list[str]) -> tuple[Path, str]:
    """A repository of one of the `owners`; only its safetensors and JSON are downloaded."""
    matched = HUB_ID.fullmatch(repo_id)
    if not matched or matched[1] not in owners:
        allowed = f"loads from {', '.join(owners)} only" if owners else "loads from nobody there"
        raise Refused(403, f"hub={repo_id!r}: name a repository of the Hub as owner/name; this service {allowed}.")
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*ADAPTER_FILES, PROCESSOR_FILE]))
    except Exception as error:  # whatever network, Hub and disk come up with: the adapter could not be had
        raise Refused(424, f"hub={repo_id!r}, revision={revision!r} could not be downloaded: {error}") from error
    return checked(folder, repo_id), f"{repo_id}@{folder.name}"  # a snapshot's folder is called as its commit


def checked(folder: Path, name: str) -> Path:
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise Refused(422, f"{name!r} has no {file}. Only adapters saved as safetensors are loaded.")
    return folder


def check_processor(adapter: Path, expected: dict) -> None:
    """Refuse an adapter trained on pixels prepared in another way; all adapters of a batch see the same pixels."""
    if (adapter / PROCESSOR_FILE).is_file():
        own = json.loads((adapter / PROCESSOR_FILE).read_text())
        for setting in ("size", "crop_size", "image_mean", "image_std", "rescale_factor", "do_normalize", "resample"):
            if setting in own and own[setting] != expected.get(setting):
                raise Refused(
                    422,
                    f"The adapter was trained on images with {setting}={own[setting]}; this service prepares them with "
                    f"{setting}={expected.get(setting)}.",
                )
