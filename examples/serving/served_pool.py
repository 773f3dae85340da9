"""A pool that always holds the adapters of the catalogue."""

import logging
import threading

import torch
from catalogue import Catalogue, Entry
from torch import Tensor
from validation import Refused

from fact_peft import AdapterPool, Prediction

logger = logging.getLogger("ray.serve")


class ServedPool:
    """The pool of one replica. It checks the manifest before every batch, which costs one `stat` if nothing changed.

    Args:
        pool: The pool to load adapters into.
        catalogue: The adapters to load.
        device: Device of the pool's model.
    """

    def __init__(self, pool: AdapterPool, catalogue: Catalogue, device: torch.device | str = "cpu") -> None:
        self.pool, self.catalogue, self.device = pool, catalogue, device
        self.lock = threading.Lock()  # held while the pool is updated or used
        self.stamp: object = self  # differs from the stamp of any manifest
        self.entries: dict[str, Entry] = {}  # the manifest at the last update of the pool
        self.loaded: dict[str, Entry] = {}
        self.failed: dict[str, str] = {}
        self.follow()

    def known(self) -> dict[str, Entry]:
        """The current manifest."""
        return self.entries if self.catalogue.stamp() == self.stamp else self.catalogue.read()

    def classify(self, items: list[tuple[Tensor, str]]) -> list[Prediction | Refused]:
        """Classify pairs of pixels (channels, height, width) and adapter in one pass."""
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
        """Whether the pool has every adapter of the manifest. If a batch is running, this does not wait for it, since
        the batch has just updated the pool."""
        if self.lock.acquire(blocking=False):
            try:
                self.follow()
            finally:
                self.lock.release()
        counts = {"adapters": len(self.entries), "loaded": len(self.loaded), "failed": self.failed}
        return {"status": "incomplete" if self.failed else "ok", **counts}

    def follow(self) -> None:
        """Update the pool to the manifest, and again if the manifest has changed meanwhile."""
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
        """The answer for an adapter that was in the manifest when the request came, and is not in the pool."""
        if name in self.failed:
            return Refused(503, f"The adapter {name!r} could not be loaded: {self.failed[name]}")
        return Refused(404, f"The adapter {name!r} was deleted while the request was waiting.")
