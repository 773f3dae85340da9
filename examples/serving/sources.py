"""The sources from which PUT loads adapters: one folder of this machine, and owners on the Hub named at the start."""

import json
import re
from pathlib import Path

from catalogue import ADAPTER_FILES, PROCESSOR_FILE
from huggingface_hub import snapshot_download
from pydantic import BaseModel, ValidationError
from validation import Refused

MAX_SOURCE_BYTES = 10_000
MAX_FILE_BYTES = {ADAPTER_FILES[0]: 10_000_000, ADAPTER_FILES[1]: 1_000_000_000, PROCESSOR_FILE: 10_000_000}
HUB_ID = re.compile(r"([\w.-]+)/[\w.-]+")


class Source(BaseModel):
    """Body of PUT: either a folder, or a repository on the Hub with a branch, tag or commit."""

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


def from_folder(name: str, allowed: Path | None) -> tuple[Path, str]:
    """A folder inside `allowed`, and its name for display. Links must not lead outside `allowed`."""
    if allowed is None:
        raise Refused(403, "This service loads from no folder: it was started without --adapters.")
    outside = Refused(403, f"folder={name!r} is not inside the folder of adapters that this service loads from.")
    try:
        root, folder = allowed.resolve(), (allowed / name).resolve()
        if root not in folder.parents:
            raise outside
        if not folder.is_dir():
            raise Refused(404, f"folder={name!r} is not there, in the folder of adapters that this service loads from.")
        if any(root not in (folder / file).resolve().parents for file in MAX_FILE_BYTES):
            raise outside
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a cycle of links, a NUL
        raise Refused(422, f"folder={name[:100]!r} cannot be the name of a folder.") from error
    return checked(folder, name), name


def from_hub(repo_id: str, revision: str | None, owners: list[str]) -> tuple[Path, str]:
    """A downloaded repository of one of the `owners`, with safetensors and JSON only, and its name for display."""
    matched = HUB_ID.fullmatch(repo_id)
    if not matched or matched[1] not in owners:
        allowed = f"loads from {', '.join(owners)} only" if owners else "loads from nobody there"
        raise Refused(403, f"hub={repo_id!r}: name a repository of the Hub as owner/name; this service {allowed}.")
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*ADAPTER_FILES, PROCESSOR_FILE]))
    except Exception as error:  # network, Hub and disk fail in many ways
        raise Refused(424, f"hub={repo_id!r}, revision={revision!r} could not be downloaded: {error}") from error
    return checked(folder, repo_id), f"{repo_id}@{folder.name}"  # the folder of a snapshot has the name of its commit


def checked(folder: Path, name: str) -> Path:
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise Refused(422, f"{name!r} has no {file}. Only adapters saved as safetensors are loaded.")
    for file, limit in MAX_FILE_BYTES.items():
        if (folder / file).is_file() and (folder / file).stat().st_size > limit:
            raise Refused(413, f"{name!r} has a {file} of more than {limit:,} bytes.")
    return folder


def check_files(adapter: Path, expected: dict) -> None:
    """Refuse an adapter that the service cannot use.

    All adapters of a batch get the same pixels, so each must have been trained on images prepared as in `expected`.
    """
    read_settings(adapter / ADAPTER_FILES[0])
    if not (adapter / PROCESSOR_FILE).is_file():
        return
    own = read_settings(adapter / PROCESSOR_FILE)
    for setting in ("size", "crop_size", "image_mean", "image_std", "rescale_factor", "do_normalize", "resample"):
        if setting in own and own[setting] != expected.get(setting):
            raise Refused(
                422,
                f"The adapter was trained on images with {setting}={own[setting]!r}; this service prepares them with "
                f"{setting}={expected.get(setting)!r}.",
            )


def read_settings(file: Path) -> dict:
    """A JSON object that UTF-8 can encode. JSON allows half of a surrogate pair, UTF-8 does not."""
    try:
        settings = json.loads(file.read_text())
        json.dumps(settings, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"{file.name} is no JSON that can be read: {error!r}.") from error
    if not isinstance(settings, dict):
        raise Refused(422, f"{file.name} holds no JSON object.")
    return settings
