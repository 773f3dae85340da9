"""The factors that all layers share, owned once.

One `FacTStack` per slice shape is registered on the adapted model itself, under the name `FACTORS`; the layers hold an
unregistered reference to it and read its factors at call time. So every factor is one parameter under one name: it is
counted, saved, sharded and synchronised once, whichever wrapper (DDP, FSDP, ZeRO) owns the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter.config import FacTConfig
from ..adapter.storage import bits_of
from ..method.decomposition import DECOMPOSITIONS, Decomposition
from ..method.tensorization import Slices

# Of every decomposition, each once.
CORE_FACTORS = tuple(dict.fromkeys(name for member in DECOMPOSITIONS.values() for name in member.core_factors))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Have new tensors be ordinary ones, also inside ``torch.inference_mode()``, whose own can never be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class FacTLayer(BaseTunerLayer):
    """Whatever of an adapted model belongs to FacT: what PEFT visits to switch, freeze or delete adapters."""

    def forget(self, adapter_name: str) -> None:
        """Drop what belongs to an adapter, for another of the same name; which ones are active does not change."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]


class SharedFactors(nn.ModuleDict):
    """The stacks of a model by slice shape.

    On an ``nn.Sequential`` they are one more child, the last: whoever indexes, slices, counts or iterates over an
    adapted one meets it (``model[:-1]`` drops the factors, not the head). Since the factors must be a parameter of the
    adapted model itself, they can be nowhere else there; adapt a module that holds the Sequential instead.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pass through, so that an ``nn.Sequential``, which calls all its children, can carry the factors too."""
        return x


class FacTStack(nn.Module, FacTLayer):
    """The factors of all slices of one shape, for every adapter of the model.

    Paper letters: ``fact_U`` (d, r), ``fact_V`` (e, r), ``fact_Sigma`` (N, r, r) for tensor-train, ``fact_C``
    (r, r, r) and ``fact_P`` (N, r) for Tucker; each a dict from adapter name to parameter. ``fact_config`` has, per
    adapter, the model's own config: scale, dropout and decomposition are read from there.
    """

    adapter_layer_names = ("fact_U", "fact_V", *(f"fact_{name}" for name in CORE_FACTORS))
    other_param_names = ("fact_config",)
    fact_U: nn.ParameterDict
    fact_V: nn.ParameterDict
    # BaseTunerLayer looks these up in a base layer; a stack has none.
    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def __init__(self, in_features: int, out_features: int) -> None:
        """
        Args:
            in_features: Inputs d of one slice.
            out_features: Outputs e of one slice.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.fact_config: dict[str, FacTConfig] = {}
        self.merged_adapters = []
        self.unloaded: set[str] = set()

    def add_adapter(self, adapter_name: str, config: FacTConfig, num_slices: int) -> None:
        """Create and initialise the factors of an adapter with `num_slices` slices in this stack."""
        self.fact_config[adapter_name] = config
        decomposition = DECOMPOSITIONS[config.decomposition]
        shapes = decomposition.shapes(self.in_features, self.out_features, num_slices, config.rank)
        factors = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        decomposition.init(factors, config.init_weights)
        for name, factor in factors.items():
            getattr(self, f"fact_{name}")[adapter_name] = factor

    def decomposition(self, adapter_name: str) -> Decomposition:
        """How the cores of an adapter are written."""
        return DECOMPOSITIONS[self.fact_config[adapter_name].decomposition]

    def scale(self, adapter_name: str) -> float:
        """The scale s of an adapter."""
        return self.fact_config[adapter_name].scaling

    def dropout(self, adapter_name: str) -> float:
        """The probability of dropout on an adapter's activation between core and V, when it trains."""
        return float(self.fact_config[adapter_name].fact_dropout)

    def factors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The factors of an adapter under their paper letters."""
        names = ("U", "V", *self.decomposition(adapter_name).core_factors)
        return {name: getattr(self, f"fact_{name}")[adapter_name] for name in names}

    def cores(self, adapter_name: str, slices: Slices) -> Tensor:
        """Sigma_k (count, r, r) of a layer's slices."""
        decomposition = self.decomposition(adapter_name)
        factors = {name: getattr(self, f"fact_{name}")[adapter_name] for name in decomposition.core_factors}
        return decomposition.cores(factors, slices.first, slices.count)

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (d, r), all cores Sigma_k (N, r, r) and V (e, r) of an adapter."""
        decomposition, factors = self.decomposition(adapter_name), self.factors(adapter_name)
        return factors["U"], decomposition.all_cores(factors), factors["V"]

    def await_numbers(self, adapter_name: str) -> None:
        """Note that the factors of a saved adapter were created and are to be loaded."""
        self.unloaded.add(adapter_name)

    def check_loaded(self, adapter_name: str) -> None:
        """Refuse to compute with factors whose packed file was never unpacked.

        transformers' own loader copies tensors by name and leaves out what has another shape, as packed bytes do.

        Raises:
            ValueError: If the adapter is saved in integers and was not loaded.
        """
        config = self.fact_config[adapter_name]
        if adapter_name in self.unloaded and (bits_of(config.storage) or bits_of(config.storage_of_heads)):
            raise ValueError(
                f"Adapter {adapter_name!r} is saved as {config.storage or config.storage_of_heads}, and its numbers "
                "were not loaded: transformers' load_adapter does not read packed files. Load it with "
                "PeftModel.from_pretrained or Adapter.read(folder).attach(model); to train a new adapter with this "
                "config, set layout=None."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.unloaded -= {name for name in self.unloaded if f"{prefix}fact_U.{name}" in state_dict}

    @torch.no_grad()
    def place(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the factors of an adapter, unless they are still on the meta device."""
        for factor in self.factors(adapter_name).values():
            if factor.device.type != "meta":
                factor.data = factor.data.to(device=device, dtype=dtype)

    # PEFT asks every tuner layer to merge. The linear layers do, and keep `merged_adapters` of the stack current.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        pass

    def unmerge(self) -> None:
        pass

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to do: the first layer of the stack decides, see `FacTLinear`."""

    def extra_repr(self) -> str:
        return f"slices of {self.in_features}x{self.out_features}"
