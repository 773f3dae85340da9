"""A pool of adapters that holds what the catalogue says, whoever changed it."""

import logging
import threading

import torch
from catalogue import Catalogue, Entry
from torch import Tensor
from validation import Refused

from fact_peft import AdapterPool, Prediction

logger = logging.getLogger("ray.serve")


class ServedPool:
    """One replica's pool. It looks at the manifest before every batch, which costs one `stat` as long as none changed.

    Args:
        pool: Takes the adapters.
        catalogue: Says which.
        device: Where the pool wants its pixels.
    """

    def __init__(self, pool: AdapterPool, catalogue: Catalogue, device: torch.device | str = "cpu") -> None:
        self.pool, self.catalogue, self.device = pool, catalogue, device
        self.lock = threading.Lock()  # between those who bring the pool up to date and those who use it
        self.stamp: object = self  # unlike that of any manifest
        self.entries: dict[str, Entry] = {}  # what the manifest said when the pool was last brought up to date
        self.loaded: dict[str, Entry] = {}
        self.failed: dict[str, str] = {}
        self.follow()

    def known(self) -> dict[str, Entry]:
        """The manifest as it is now."""
        return self.entries if self.catalogue.stamp() == self.stamp else self.catalogue.read()

    def classify(self, items: list[tuple[Tensor, str]]) -> list[Prediction | Refused]:
        """One pass over pairs of pixels (channels, height, width) and adapter."""
        with self.lock:
            self.follow()
            present = [index for index, (_, name) in enumerate(items) if name in self.loaded]
            answers = [self.why_not(name) for _, name in items]
            if present:
                pixels, names = zip(*(items[index] for index in present), strict=True)
                predictions = self.pool(torch.stack(pixels).to(self.device), list(names))
                for index, prediction in zip(present, predictions, strict=True):
                    answers[index] = prediction
            return answers

    def increment_norms(self, name: str) -> dict[str, float]:
        """||dW|| by layer name."""
        with self.lock:
            self.follow()
            if name not in self.loaded:
                raise self.why_not(name)
            return self.pool.increment_norms(name)

    def health(self) -> dict:
        """Does the pool hold every adapter of the manifest? Never waits for a batch, which has just brought it up to
        date."""
        if self.lock.acquire(blocking=False):
            try:
                self.follow()
            finally:
                self.lock.release()
        counts = {"adapters": len(self.entries), "loaded": len(self.loaded), "failed": self.failed}
        return {"status": "incomplete" if self.failed else "ok", **counts}

    def follow(self) -> None:
        """Bring the pool to what the manifest says, and again if that has changed meanwhile."""
        while (stamp := self.catalogue.stamp()) != self.stamp:
            entries = self.catalogue.read()
            for name in self.loaded.keys() - entries.keys():
                self.drop(name)
            self.failed = {}
            for name, entry in entries.items():
                if self.loaded.get(name) != entry:
                    try:
                        self.pool.load(name, self.catalogue.folder(entry))
                        self.loaded[name] = entry
                    except (ValueError, OSError) as error:
                        logger.error("Adapter %s cannot be loaded: %s", name, error)
                        self.failed[name] = str(error)
                        if name in self.loaded:
                            self.drop(name)
            self.entries, self.stamp = entries, stamp

    def drop(self, name: str) -> None:
        self.pool.unload(name)
        del self.loaded[name]

    def why_not(self, name: str) -> Refused:
        """For an adapter that the manifest had when the request came, and the pool has not."""
        if name in self.failed:
            return Refused(503, f"The adapter {name!r} could not be loaded: {self.failed[name]}")
        return Refused(404, f"The adapter {name!r} was deleted while the request was waiting.")
