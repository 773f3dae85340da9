"""The factors that all layers share, owned once.

One `FacTStack` per slice shape is registered on the adapted model itself, under the name `FACTORS`; the layers hold an
unregistered reference to it and read its factors at call time. So every factor is one parameter under one name: it is
counted, saved, sharded and synchronised once, whichever wrapper (DDP, FSDP, ZeRO) owns the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ..adapter.config import FacTConfig
from ..adapter.storage import bits_of
from ..adapter.validation import FACTORS
from ..method.decomposition import DECOMPOSITIONS, Decomposition
from ..method.tensorization import Slices

logger = logging.getLogger(__name__)
# Of every decomposition, each once.
CORE_FACTORS = tuple(dict.fromkeys(name for member in DECOMPOSITIONS.values() for name in member.core_factors))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Have new tensors be ordinary ones, also inside ``torch.inference_mode()``, whose own can never be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class FacTLayer(BaseTunerLayer):
    """Whatever of an adapted model belongs to FacT: what PEFT visits to switch, freeze or delete adapters."""

    cast_input_dtype_enabled = True  # for PEFT's `disable_input_dtype_casting`; inputs are not cast here

    def forget(self, adapter_name: str) -> None:
        """Drop what belongs to an adapter, for another of the same name; which ones are active does not change."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]


class Configs(dict[str, FacTConfig]):
    """Configs by adapter name, one object for all modules that hold it.

    ``torch.export`` replaces every plain dict that is an attribute of a module by a copy, but no subclass of dict.
    """


class SharedFactors(nn.ModuleDict):
    """The stacks of a model by slice shape.

    On an ``nn.Sequential`` they are one more child, the last: whoever indexes, slices, counts or iterates over an
    adapted one meets it (``model[:-1]`` drops the factors, not the head). Since the factors must be a parameter of the
    adapted model itself, they can be nowhere else there; adapt a module that holds the Sequential instead.

    As the last child they are also the last that ``model.train()`` reaches, and they put frozen layers with running
    statistics, such as ``nn.BatchNorm2d``, back into evaluation mode. In training mode the statistics would move, and
    they are not saved with the adapter.

    Attributes:
        configs: The model's own config of each adapter. Stacks and heads read this very dict.
        hook: What the model has been given to announce its state dicts, see `saved_alone`.
        frozen_norms: The layers to keep in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.configs = Configs()
        self.hook: RemovableHandle | None = None
        self.frozen_norms: list[nn.Module] = []  # a list hides them from nn.Module

    def keep_statistics(self, model: nn.Module) -> None:
        """From now on keep the running statistics of `model` as they are, except in modules trained in full."""
        norms = {name: module for name, module in model.named_modules() if hasattr(module, "running_mean")}
        frozen = {name: module for name, module in norms.items() if ".modules_to_save." not in f".{name}"}
        self.frozen_norms = list(frozen.values())
        if frozen:
            logger.info("%d frozen layers with running statistics stay in evaluation mode.", len(frozen))
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``, and put frozen layers with running statistics into evaluation mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def stack_for(self, slices: Slices) -> FacTStack:
        """The stack that holds `slices`, created where it is missing."""
        if slices.stack not in self:
            self[slices.stack] = FacTStack(slices.in_width, slices.out_width, self.configs)
        stack = self[slices.stack]
        assert isinstance(stack, FacTStack)
        return stack

    def forward(self, x: Tensor) -> Tensor:
        """Pass through, so that an ``nn.Sequential``, which calls all its children, can carry the factors too."""
        return x


def remove_factors(model: nn.Module) -> None:
    """Take the shared factors off a model."""
    factors = getattr(model, FACTORS, None)
    if isinstance(factors, SharedFactors):
        if factors.hook is not None:
            factors.hook.remove()
        delattr(model, FACTORS)


class FacTStack(nn.Module, FacTLayer):
    """The factors of all slices of one shape, for every adapter of the model.

    Paper letters: ``fact_U`` (d, r), ``fact_V`` (e, r), ``fact_Sigma`` (N, r, r) for tensor-train, ``fact_C``
    (r, r, r) and ``fact_P`` (N, r) for Tucker; each a dict from adapter name to parameter. Scale, dropout and
    decomposition are read from the adapter's config when they are needed.
    """

    adapter_layer_names = ("fact_U", "fact_V", *(f"fact_{name}" for name in CORE_FACTORS))
    other_param_names = ("configs", "unloaded")
    fact_U: nn.ParameterDict
    fact_V: nn.ParameterDict
    announced = False  # for a state dict, see `saved_alone`
    # BaseTunerLayer looks these up in a base layer; a stack has none.
    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def __init__(self, in_features: int, out_features: int, configs: dict[str, FacTConfig]) -> None:
        """
        Args:
            in_features: Inputs d of one slice.
            out_features: Outputs e of one slice.
            configs: Of all adapters of the model, see `SharedFactors`.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs = configs
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.num_merged: Counter[str] = Counter()
        self.unloaded: dict[str, list[nn.Parameter]] = {}

    def add_adapter(self, adapter_name: str, config: FacTConfig, num_slices: int) -> None:
        """Create and initialise the factors of an adapter with `num_slices` slices in this stack."""
        self.configs[adapter_name] = config
        decomposition = DECOMPOSITIONS[config.decomposition]
        shapes = decomposition.shapes(self.in_features, self.out_features, num_slices, config.rank)
        factors = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        decomposition.init(factors, config.init_weights)
        for name, factor in factors.items():
            getattr(self, f"fact_{name}")[adapter_name] = factor

    def decomposition(self, adapter_name: str) -> Decomposition:
        """How the cores of an adapter are written."""
        return DECOMPOSITIONS[self.configs[adapter_name].decomposition]

    def scale(self, adapter_name: str) -> float:
        """The scale s of an adapter."""
        return self.configs[adapter_name].scaling

    def dropout(self, adapter_name: str) -> float:
        """The probability of dropout on an adapter's activation between core and V, when it trains."""
        return float(self.configs[adapter_name].fact_dropout)

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The factors of an adapter under their paper letters.

        Raises:
            RuntimeError: If accelerate has offloaded them and they are to be trained.
        """
        if self.unloaded:
            self.check_loaded(adapter_name)
        names = ("U", "V", *self.decomposition(adapter_name).core_factors)
        return {name: self._onloaded(getattr(self, f"fact_{name}"), adapter_name) for name in names}

    def _onloaded(self, holder: nn.ParameterDict, adapter_name: str) -> Tensor:
        """A factor, also if accelerate's offloading has it elsewhere: it is brought back for calls of `holder` only."""
        factor: nn.Parameter = holder[adapter_name]
        hook: Any = getattr(holder, "_hf_hook", None) if factor.is_meta else None
        if hook is None:
            return factor
        if self.training and factor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The factors of adapter {adapter_name!r} are offloaded and cannot be trained; offload the model first "
                "and adapt it then."
            )
        offloaded: Tensor = hook.weights_map[adapter_name]
        return offloaded

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (d, r), all cores Sigma_k (N, r, r) and V (e, r) of an adapter."""
        return self.decomposition(adapter_name).terms(self.factors(adapter_name))

    def await_numbers(self, adapter_name: str, trained: list[nn.Parameter]) -> None:
        """Note that the factors of a saved adapter were created and are to be loaded.

        Args:
            adapter_name: The adapter.
            trained: What was trained before it was added, for the case that its numbers are refused.
        """
        self.unloaded[adapter_name] = trained

    def check_loaded(self, adapter_name: str) -> None:
        """Refuse to compute with factors that transformers' own loader cannot have loaded.

        It copies tensors by name and leaves out those of another shape, as packed bytes are, or of another name, as a
        block has in a bare model.

        Raises:
            ValueError: If the adapter is saved in integers or under other names, and was not loaded.
        """
        config = self.configs[adapter_name]
        packed = bits_of(config.storage) or bits_of(config.storage_of_heads)
        renamed = config.share == "block" and config.renaming.changes_names
        if adapter_name in self.unloaded and (packed or renamed):
            raise ValueError(
                f"The numbers of adapter {adapter_name!r} were not loaded: transformers' load_adapter does not read "
                + (f"packed files ({config.storage or config.storage_of_heads})" if packed else "blocks of other names")
                + ". Load it with PeftModel.from_pretrained or Adapter.read(folder).attach(model); to train a new "
                "adapter with this config, set layout=None."
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)
        self.announced = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = [name for name in self.unloaded if f"{prefix}fact_U.{name}" in state_dict]
        for name in loaded:
            del self.unloaded[name]

    @torch.no_grad()
    def place(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the factors of an adapter, unless they are still on the meta device."""
        for factor in self.factors(adapter_name).values():
            if factor.device.type != "meta":
                factor.data = factor.data.to(device=device, dtype=dtype)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters that a layer has merged, for PEFT's status of the model."""
        return list(self.num_merged)

    @ordinary_tensors()
    def merge_in(self, adapter_name: str) -> dict[str, Tensor]:
        """Count one more layer that has merged an adapter.

        Returns:
            Copies of the factors as they are now, for unmerging: one set for all layers, until a factor changes.
        """
        factors = self.factors(adapter_name)
        copies = self.copies.get(adapter_name)
        if copies is None or not all(torch.equal(copies[name], factor) for name, factor in factors.items()):
            self.copies[adapter_name] = {name: factor.detach().clone() for name, factor in factors.items()}
        self.num_merged[adapter_name] += 1
        return self.copies[adapter_name]

    def take_out(self, adapter_name: str) -> None:
        """Count one layer less; after the last one, nothing is kept."""
        self.num_merged[adapter_name] -= 1
        if not self.num_merged[adapter_name]:
            del self.num_merged[adapter_name], self.copies[adapter_name]

    # PEFT asks every tuner layer to merge. The linear layers do.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        pass

    def unmerge(self) -> None:
        pass

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to do: the first layer of the stack decides, see `FacTLinear`."""

    def extra_repr(self) -> str:
        return f"slices of {self.in_features}x{self.out_features}"
