"""Thousands of adapters with their heads and labels on one frozen model, for inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..method.fused_linear import autocast_dtype
from ..tuner.adapter_names import check_batch_axis
from ..tuner.mixed_batch import BASE, calling_with
from .adapter_cache import AdapterCache
from .pooled_adapter import PooledAdapter
from .pooled_model import PooledModel

Source = str | Path | Adapter | tuple[FacTConfig, dict[str, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prediction:
    """The answer of one adapter, or of the base model alone, to one image.

    Attributes:
        adapter: Name of the adapter; None for the base model.
        logits: (num_labels,), on the device of the model.
        labels: The class names in the order of the logits; None if they are not known.
    """

    adapter: str | None
    logits: Tensor
    labels: list[str] | None

    @property
    def scores(self) -> Tensor:
        """Probabilities (num_labels,) in float32."""
        return self.logits.float().softmax(-1)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes, or all if there are fewer, with their probabilities.

        A class without a name is called by its number.
        """
        scores, indices = self.scores.topk(min(k, len(self.logits)))
        names = [str(i) if self.labels is None else self.labels[i] for i in indices.tolist()]
        return list(zip(names, scores.tolist(), strict=True))


class AdapterPool:
    """Computes one batch in which every image has the adapter, or the adapters, that are asked for it.

    The pool holds an adapter as one vector of numbers; it is neither a module nor a parameter. Any number of threads
    may call the pool and load adapters at the same time. A call uses the versions of the adapters that the pool had
    when the call began.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        device_capacity: int | None = None,
        host_capacity: int | None = None,
        spill_folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            vit: An image classifier of transformers or timm with linear heads and without adapters. It is not changed;
                the pool works on its weights, not on a copy of them.
            device_capacity: How many adapters are kept on the device of `vit`; None for all.
            host_capacity: How many of the others are kept in host memory; None for all.
            spill_folder: Where the rest is written to disk.
            dtype: What the adapters are stored in: float32, bfloat16 or float16.

        Raises:
            ValueError: If `vit` has adapters or no linear head, or a capacity or the dtype is out of range.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} is none of {', '.join(map(str, DTYPES))}.")
        self.model = PooledModel(vit)
        self.dtype = dtype
        self._run: Any = self.model.module
        self._lock = Lock()  # for the attributes below
        self._cache = AdapterCache(self.model.reference.device, device_capacity, host_capacity, spill_folder)
        self._versions: dict[str, PooledAdapter] = {}
        self._loads = 0

    def load(self, name: str, source: Source, *, revision: str | None = None, token: str | bool | None = None) -> None:
        """Add an adapter, or replace the one that has this name.

        Args:
            name: The name by which calls ask for it.
            source: A folder, a name on the Hub, an `Adapter`, or a pair of a config and what
                `get_peft_model_state_dict` returns.
            revision: Branch, tag or commit on the Hub.
            token: Hub token.

        Raises:
            ValueError: If it cannot be read, does not fit the model, or has something that cannot be pooled: biases or
                modules beside the head. The pool is then as it was.
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"name={name!r} cannot name an adapter; pass a string that is not empty nor {BASE!r}.")
        version, vector = self.model.admit(name, read(source, revision, token), self.dtype)
        with self._lock:
            self._cache.put(version, vector)
            earlier = self._versions.get(name)
            self._versions[name] = version
            if earlier is not None:
                self._cache.drop(earlier)
            self._loads += 1

    def unload(self, name: str) -> None:
        """Remove an adapter. Calls that have begun finish with it.

        Raises:
            ValueError: If there is none of this name.
        """
        with self._lock:
            self._cache.drop(self._version(name))
            del self._versions[name]

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def __len__(self) -> int:
        return len(self._versions)

    def names(self) -> list[str]:
        """The names of all adapters, in the order they were loaded first."""
        with self._lock:
            return list(self._versions)

    def stats(self) -> dict[str, int]:
        """How many adapters are ``resident`` on the device, in ``host`` memory and on ``disk``, the ``bytes`` of those
        in memory, and the numbers of ``evictions`` from the device and of ``loads`` since the pool was made."""
        with self._lock:
            return {**self._cache.stats(), "loads": self._loads}

    def increment_norms(self, name: str) -> dict[str, float]:
        """Frobenius norm of an adapter's dW, scale included, by layer name: where it acts.

        Raises:
            ValueError: If there is none of this name.
        """
        with self._lock:
            version = self._version(name)
            vector = self._cache.take(version)
        return version.increment_norms(vector)

    def compile(self, **options: Any) -> None:
        """Compile the model with ``torch.compile``. Other adapters do not compile it again; a rank or a number of
        labels beyond the next power of two, and another batch size, may."""
        self._run = torch.compile(self.model.module, **options)

    @torch.no_grad()
    def __call__(
        self, pixel_values: Tensor, adapters: Sequence[str | Sequence[str] | None]
    ) -> list[Prediction | list[Prediction]]:
        """Classify images with adapters.

        Args:
            pixel_values: (B, channels, height, width), on the device of the model.
            adapters: For every image the name of an adapter, a list of names, or None for the model alone.

        Returns:
            For every image a prediction, or a list of them where `adapters` has a list.

        Raises:
            ValueError: If `adapters` is not one entry per image, or names an adapter that is not there.
        """
        if isinstance(adapters, str) or len(adapters) != len(pixel_values):
            raise ValueError(f"adapters={adapters!r} is not one entry for each of {len(pixel_values)} images.")
        asked = [
            (image, None if name == BASE else name)
            for image, entry in enumerate(adapters)
            for name in ([entry] if isinstance(entry, str | None) else entry)
        ]
        predictions = iter(self._predict(pixel_values, asked) if asked else [])
        return [
            next(predictions) if isinstance(entry, str | None) else [next(predictions) for _ in entry]
            for entry in adapters
        ]

    def _predict(self, pixel_values: Tensor, asked: Sequence[tuple[int, str | None]]) -> list[Prediction]:
        """One prediction for each pair of image and adapter."""
        with self._lock:
            versions = [None if name is None else self._version(name) for _, name in asked]
            owners = [None if version is None else (version, self._cache.take(version)) for version in versions]
        rows = [image for image, _ in asked]
        if rows != list(range(len(pixel_values))):
            pixel_values = pixel_values[torch.tensor(rows, device=pixel_values.device)]
        batch = None
        if any(owners):
            batch = self.model.gather(owners, autocast_dtype(pixel_values) or self.model.reference.dtype)
            check_batch_axis(self.model.module, batch, (pixel_values,), {})
        with calling_with(batch):
            output = self._run(pixel_values)
        # Cloned, since a compiled model may write its next output into the same memory.
        logits = (output if isinstance(output, Tensor) else output.logits).clone()
        return [
            Prediction(name, scores[: owner.num_labels], owner.labels)
            for (_, name), scores, owner in zip(asked, logits, [v or self.model for v in versions], strict=True)
        ]

    def _version(self, name: str) -> PooledAdapter:
        if name not in self._versions:
            raise ValueError(f"There is no adapter {name!r} in the pool; load it first.")
        return self._versions[name]


def read(source: Any, revision: str | None, token: str | bool | None) -> Adapter:
    """The adapter of a `Source`."""
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], FacTConfig):
        return Adapter.from_state_dict(source[0], source[1])
    if isinstance(source, (str, Path)):
        return Adapter.read(source, revision, token)
    raise ValueError(
        f"source is a {type(source).__name__}; pass a folder, a name on the Hub, an Adapter, or a pair of FacTConfig "
        "and state dict."
    )
