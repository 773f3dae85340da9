"""What the service can be told, on the command line or as ``serve run serve:build replicas=2 backbone=...``."""

import os
from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass


@dataclass
class Settings:
    backbone: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the frozen model. Without: one trained on digits."}
    )
    adapters: str = field(
        default="outputs/serving/adapters",
        metadata={"help": "Folder of adapters, one folder each; all are served from the first start on."},
    )
    state: str = field(
        default="outputs/serving/state",
        metadata={"help": "Where the service keeps which adapters it has; on a cluster, shared by all machines."},
    )
    hub_owners: list[str] = field(
        default_factory=list, metadata={"help": "Owners on the Hub from whose repositories PUT may load."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Another than loopback needs SERVING_TOKEN to be set."})
    port: int = field(default=8000, metadata={"help": "Port of the service."})
    replicas: int = field(default=1, metadata={"help": "Processes, each with the model and the whole pool."})
    gpus_per_replica: float = field(default=0, metadata={"help": "GPUs of each; 0.5 puts two on one."})
    max_batch_size: int = field(default=32, metadata={"help": "At most so many pairs of image and adapter at once."})
    batch_wait: float = field(default=0.002, metadata={"help": "Seconds to wait for a batch to fill."})
    device_capacity: int | None = field(default=None, metadata={"help": "Adapters on the device; None: all."})
    host_capacity: int | None = field(default=None, metadata={"help": "Adapters in host memory; None: all others."})
    max_body_bytes: int = field(default=10_000_000, metadata={"help": "Longer requests are refused."})
    max_pixels: int = field(default=20_000_000, metadata={"help": "Images with more are refused, undecoded."})

    def __post_init__(self) -> None:
        """Paths become absolute: replicas run elsewhere.

        Raises:
            ValueError: If the service would let everyone on the network change its adapters.
        """
        self.adapters, self.state = str(Path(self.adapters).resolve()), str(Path(self.state).resolve())
        if self.backbone and Path(self.backbone).is_dir():
            self.backbone = str(Path(self.backbone).resolve())
        if self.host not in ("127.0.0.1", "localhost", "::1") and not token():
            raise ValueError(
                f"host={self.host!r} is open to the network: set the environment variable SERVING_TOKEN to the token "
                "that changing adapters shall need, or keep host='127.0.0.1'."
            )


def token() -> str | None:
    """The bearer token; from the environment, since command lines are visible to all users of a machine."""
    return os.environ.get("SERVING_TOKEN")
