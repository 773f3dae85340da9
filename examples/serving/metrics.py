"""What the service did, over all replicas: each writes its counts into one file, and whoever is asked adds them up.

Latencies are counted in bins that grow by a tenth, so that the counts of replicas can be added and a quantile is right
to 5 %. The counts of a replica that died stay in the sums.
"""

import json
import math
import os
import socket
import time
from collections import Counter
from pathlib import Path

ALIVE = 5.0  # seconds after which a replica that wrote nothing is called dead


class Metrics:
    """The counts of one replica, written to ``folder/REPLICA.json``."""

    def __init__(self, folder: Path, replica: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / f"{replica}.json"
        self.statuses: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        self.latencies: Counter[str] = Counter()

    def count_request(self, status: int, seconds: float) -> None:
        """Latency is that of answered predictions, from the moment the replica has the request."""
        self.statuses[str(status)] += 1
        if status == 200:
            self.latencies[str(math.ceil(math.log(max(seconds, 1e-6), 1.1)))] += 1

    def count_batch(self, size: int) -> None:
        self.batches[str(size)] += 1

    def write(self, pool: dict) -> None:
        """Leave the counts, and what the pool says of itself, where all replicas find them."""
        own = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "pool": pool}
        counts = {"statuses": self.statuses, "batches": self.batches, "latencies": self.latencies}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({**own, **counts}))
        part.replace(self.file)

    def summary(self) -> dict:
        """Requests by status, latency quantiles, batch sizes, and every living replica's pool."""
        replicas = {file.stem: json.loads(file.read_text()) for file in self.folder.glob("*.json")}
        statuses, batches, latencies = (
            sum((Counter(replica[kind]) for replica in replicas.values()), Counter[str]())
            for kind in ("statuses", "batches", "latencies")
        )
        num_items = sum(int(size) * count for size, count in batches.items())
        living = {name: replica for name, replica in replicas.items() if time.time() - replica["time"] < ALIVE}
        return {
            "requests": {"total": statuses.total(), **dict(sorted(statuses.items()))},
            "latency_ms": {f"p{per_cent}": quantile(latencies, per_cent / 100) for per_cent in (50, 95, 99)},
            "batches": {
                "total": batches.total(),
                "mean_size": round(num_items / batches.total(), 2) if batches else None,
                "sizes": {size: batches[size] for size in sorted(batches, key=int)},
            },
            "replicas": {
                name: {key: replica[key] for key in ("host", "pid", "pool")} for name, replica in living.items()
            },
        }


def quantile(bins: Counter[str], share: float) -> float | None:
    """Milliseconds under which `share` of what is in the bins lies: the geometric middle of the bin in question."""
    left = share * bins.total()
    for bin_ in sorted(bins, key=int):
        left -= bins[bin_]
        if left <= 0:
            return round(1000 * 1.1 ** (int(bin_) - 0.5), 3)
    return None
