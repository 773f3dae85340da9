"""Settings of the service, for the command line or ``serve run serve:build replicas=2 backbone=...``."""

import hashlib
import os
from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

OUTPUTS = Path("outputs/serving")


@dataclass
class Settings:
    backbone: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the frozen model (default: a ViT trained on digits)."}
    )
    adapters: str | None = field(
        default=None, metadata={"help": "Folder with one folder per adapter. All are loaded at the first start."}
    )
    state: str | None = field(
        default=None,
        metadata={
            "help": f"Folder where the service keeps its adapters (default: one per backbone in {OUTPUTS}/state). "
            "On a cluster all machines must share it."
        },
    )
    hub_owners: list[str] = field(
        default_factory=list, metadata={"help": "Owners on the Hub whose repositories PUT may load."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on. Any but loopback needs SERVING_TOKEN to be set."}
    )
    port: int = field(default=8000, metadata={"help": "Port of the service."})
    replicas: int = field(default=1, metadata={"help": "Number of processes, each with the model and the whole pool."})
    gpus_per_replica: float = field(default=0, metadata={"help": "GPUs of each replica; 0.5 puts two on one GPU."})
    max_batch_size: int = field(default=32, metadata={"help": "Largest number of (image, adapter) pairs in a batch."})
    batch_wait: float = field(default=0.002, metadata={"help": "Seconds to wait for a batch to fill."})
    device_capacity: int | None = field(default=None, metadata={"help": "Adapters on the device (default: all)."})
    host_capacity: int | None = field(default=None, metadata={"help": "Adapters in host memory (default: the others)."})
    max_body_bytes: int = field(default=10_000_000, metadata={"help": "Longer requests are refused."})
    max_pixels: int = field(default=20_000_000, metadata={"help": "Larger images are refused before decoding."})
    read_timeout: float = field(default=10.0, metadata={"help": "Seconds in which a request must have arrived."})

    def __post_init__(self) -> None:
        """Make paths absolute, since replicas run in another folder.

        Raises:
            ValueError: If everyone on the network could change the adapters.
        """
        if self.backbone and Path(self.backbone).is_dir():
            self.backbone = str(Path(self.backbone).resolve())
        if self.adapters is None and self.backbone is None:
            self.adapters = str(OUTPUTS / "adapters")
        if self.adapters is not None:
            self.adapters = str(Path(self.adapters).resolve())
        self.state = str(Path(self.state or OUTPUTS / "state" / folder_of(self.backbone)).resolve())
        if self.host not in ("127.0.0.1", "localhost", "::1") and not token():
            raise ValueError(
                f"host={self.host!r} is open to the network: set the environment variable SERVING_TOKEN to the token "
                "that changing adapters shall need, or keep host='127.0.0.1'."
            )


def folder_of(backbone: str | None) -> str:
    """A readable and unique name for the folder with the state of a backbone."""
    if backbone is None:
        return "digits"
    return f"{Path(backbone).name}-{hashlib.sha256(backbone.encode()).hexdigest()[:8]}"


def token() -> str | None:
    """The bearer token. It is read from the environment, since all users of a machine can see command lines."""
    return os.environ.get("SERVING_TOKEN")
