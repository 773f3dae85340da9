"""Where the numbers of adapters are: the least recently used ones move from the device to host memory and to disk."""

import shutil
import weakref
from collections import OrderedDict
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter.field_checks import is_integer
from .pooled_adapter import PooledAdapter


class AdapterCache:
    """The vectors of pooled adapters. A vector that was given out is never changed.

    Callers must hold a lock. The arguments are those of `AdapterPool`. Files are written to a new folder inside
    `spill_folder`, which is removed with this object.
    """

    def __init__(
        self,
        device: torch.device,
        device_capacity: int | None,
        host_capacity: int | None,
        spill_folder: str | Path | None,
    ) -> None:
        for name, value, least in (("device_capacity", device_capacity, 1), ("host_capacity", host_capacity, 0)):
            if value is not None and (not is_integer(value) or value < least):
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}, nor None for no limit.")
        if host_capacity is not None and spill_folder is None:
            raise ValueError(f"host_capacity={host_capacity} needs a spill_folder, for adapters beyond it.")
        self.device = device
        self.device_capacity, self.host_capacity = device_capacity, host_capacity
        self.evictions = 0
        self._on_device: OrderedDict[PooledAdapter, Tensor] = OrderedDict()
        self._on_host: OrderedDict[PooledAdapter, Tensor] = OrderedDict()
        self._files: dict[PooledAdapter, Path] = {}
        self._num_files = 0
        self._folder: Path | None = None
        if spill_folder is not None:
            Path(spill_folder).mkdir(parents=True, exist_ok=True)
            self._folder = Path(mkdtemp(prefix="adapters-", dir=spill_folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, adapter: PooledAdapter, vector: Tensor) -> None:
        """Add a new adapter. If another one has to move to the disk and cannot, nothing is added."""
        self._on_device[adapter] = vector.to(self.device)
        try:
            self._make_room()
        except Exception:
            self.drop(adapter)
            raise

    def take(self, adapter: PooledAdapter) -> Tensor:
        """The vector of an adapter, on the device. The adapter is now the most recently used one."""
        if adapter in self._on_device:
            self._on_device.move_to_end(adapter)
            return self._on_device[adapter]
        vector = self._on_host[adapter] if adapter in self._on_host else self._read(adapter)
        vector = vector.to(self.device)
        self._on_host.pop(adapter, None)
        self._on_device[adapter] = vector
        self._make_room()
        return vector

    def drop(self, adapter: PooledAdapter) -> None:
        """Remove an adapter and its file."""
        self._on_device.pop(adapter, None)
        self._on_host.pop(adapter, None)
        if adapter in self._files:
            self._files.pop(adapter).unlink(missing_ok=True)

    def stats(self) -> dict[str, int]:
        """How many adapters are where, the bytes of those in memory, and how often one left the device."""
        in_memory = {**self._on_device, **self._on_host}
        return {
            "resident": len(self._on_device),
            "host": len(self._on_host),
            "disk": len(self._files.keys() - in_memory.keys()),
            "evictions": self.evictions,
            "bytes": sum(vector.nbytes for vector in in_memory.values()),
        }

    def _make_room(self) -> None:
        while self.device_capacity is not None and len(self._on_device) > self.device_capacity:
            adapter = next(iter(self._on_device))
            self._on_host[adapter] = self._on_device[adapter].cpu()
            del self._on_device[adapter]
            self.evictions += 1
        while self.host_capacity is not None and len(self._on_host) > self.host_capacity:
            adapter = next(iter(self._on_host))
            self._write(adapter, self._on_host[adapter])
            del self._on_host[adapter]

    def _write(self, adapter: PooledAdapter, vector: Tensor) -> None:
        if adapter in self._files:
            return  # an adapter does not change, so its first file is still right
        assert self._folder is not None
        self._num_files += 1
        file = self._folder / f"{self._num_files}.safetensors"
        try:
            save_file({"numbers": vector}, file)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"spill_folder={str(self._folder.parent)!r} cannot be written ({error}); free space there, or pass "
                "another folder or a larger host_capacity."
            ) from error
        self._files[adapter] = file

    def _read(self, adapter: PooledAdapter) -> Tensor:
        file = self._files[adapter]
        try:
            return load_file(file)["numbers"].clone()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file}, to where an adapter was moved for lack of memory, cannot be read ({error}); load the adapter "
                "again, and let nobody else change the spill_folder."
            ) from error
