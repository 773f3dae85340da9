"""The factors that all layers share.

One `FacTStack` per slice shape is registered on the adapted model itself, under the name `FACTORS`. The layers hold an
unregistered reference to it and read its factors at call time. Every factor is therefore one parameter under one name:
it is counted, saved, sharded and synchronised once, whichever wrapper (DDP, FSDP, ZeRO) owns the model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ..adapter.config import FacTConfig
from ..adapter.names import FACTORS
from ..adapter.storage import bits_of
from ..method.decomposition import DECOMPOSITIONS, Decomposition
from ..method.tensorization import Slices

# The core factors of all decompositions.
CORE_FACTORS = tuple(dict.fromkeys(name for member in DECOMPOSITIONS.values() for name in member.core_factors))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Create ordinary tensors, also inside ``torch.inference_mode()``, whose inference tensors can never be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class FacTLayer(BaseTunerLayer):
    """Base class of FacT's modules, which PEFT visits to switch, freeze or delete adapters."""

    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it; FacT casts no inputs

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter without changing which adapters are active, since one of the same name may follow."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]


class Configs(dict[str, FacTConfig]):
    """The config of every adapter, in one dict that stacks and heads share.

    ``torch.export`` replaces plain dicts among the attributes of modules by copies, but not subclasses of dict.
    """


class SharedFactors(nn.ModuleDict):
    """The stacks of a model by slice shape.

    In an ``nn.Sequential`` they are the last child: indexing, slicing, counting and iterating include them, so that
    ``model[:-1]`` drops the factors and not the head. To avoid this, adapt a module that holds the Sequential.

    As the last child they are also the last that ``model.train()`` reaches. They then put frozen layers with running
    statistics, such as ``nn.BatchNorm2d``, back into evaluation mode, since changed statistics would not be saved with
    the adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.configs = Configs()  # the model's own config of each adapter
        self.hook: RemovableHandle | None = None  # of the model, announces its state dicts, see `warn_if_alone`
        self.frozen_norms: list[nn.Module] = []  # to keep in evaluation mode; a list hides them from nn.Module

    def keep_statistics(self, model: nn.Module) -> None:
        """Keep the running statistics of `model` from now on, except in modules that are trained in full."""
        self.frozen_norms = [
            module
            for name, module in model.named_modules()
            if hasattr(module, "running_mean") and ".modules_to_save." not in f".{name}"
        ]
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
        return cast(FacTStack, self[slices.stack])

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, since an ``nn.Sequential`` calls all its children."""
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

    Each factor is a dict from adapter name to parameter, named after the paper: ``fact_U`` (d, r), ``fact_V`` (e, r),
    ``fact_Sigma`` (N, r, r) for tensor-train, ``fact_C`` (r, r, r) and ``fact_P`` (N, r) for Tucker. `in_features` and
    `out_features` are d and e.
    """

    adapter_layer_names = ("fact_U", "fact_V", *(f"fact_{name}" for name in CORE_FACTORS))
    other_param_names = ("configs", "unloaded")
    fact_U: nn.ParameterDict
    fact_V: nn.ParameterDict
    announced = False  # whether the state dict that is being made has the factors, see `warn_if_alone`
    # BaseTunerLayer would look these up in a base layer, which a stack does not have.
    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def __init__(self, in_features: int, out_features: int, configs: dict[str, FacTConfig]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.configs = in_features, out_features, configs
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.copies: dict[str, dict[str, Tensor]] = {}  # the factors of merged adapters, as they were when merged
        self.num_merged: Counter[str] = Counter()  # how many layers have merged an adapter
        # The saved adapters whose numbers are still to be loaded, each with the parameters that were trained before it
        # was added. They are trained again if the numbers are refused.
        self.unloaded: dict[str, list[nn.Parameter]] = {}

    def add_adapter(self, adapter_name: str, config: FacTConfig, num_slices: int) -> None:
        """Create and initialise the factors of an adapter with `num_slices` slices in this stack."""
        self.configs[adapter_name] = config
        decomposition = self.decomposition(adapter_name)
        shapes = decomposition.shapes(self.in_features, self.out_features, num_slices, config.rank)
        factors = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        decomposition.init(factors, config.init_weights)
        for name, factor in factors.items():
            getattr(self, f"fact_{name}")[adapter_name] = factor

    def decomposition(self, adapter_name: str) -> Decomposition:
        """How the cores of an adapter are written."""
        return DECOMPOSITIONS[self.configs[adapter_name].decomposition]

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The factors of an adapter under their paper letters."""
        if self.unloaded:
            self.check_loaded(adapter_name)
            self.unloaded.pop(adapter_name, None)  # an adapter that is used stays if other numbers are refused later
        names = ("U", "V", *self.decomposition(adapter_name).core_factors)
        return {name: self._onloaded(getattr(self, f"fact_{name}"), adapter_name) for name in names}

    def _onloaded(self, holder: nn.ParameterDict, adapter_name: str) -> Tensor:
        """A factor of `holder`, also if accelerate has offloaded it, which reloads it only when `holder` is called."""
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

    def check_loaded(self, adapter_name: str) -> None:
        """Raise a ValueError if transformers' own loader was to load the factors and did not.

        It copies tensors by name and skips those of another shape, such as packed bytes, or of another name, as the
        blocks of a bare model have.
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
        for name in [name for name in self.unloaded if f"{prefix}fact_U.{name}" in state_dict]:
            del self.unloaded[name]

    @torch.no_grad()
    def place(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the factors of an adapter, unless they are still on the meta device."""
        for factor in self.factors(adapter_name).values():
            if factor.device.type != "meta":
                factor.data = factor.data.to(device=device, dtype=dtype)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters that some layer has merged; PEFT reports them in the status of the model."""
        return list(self.num_merged)

    @ordinary_tensors()
    def merge_in(self, adapter_name: str) -> dict[str, Tensor]:
        """Count one more layer that has merged an adapter, and return copies of the factors for unmerging.

        All layers get the same copies until a factor changes.
        """
        factors = self.factors(adapter_name)
        copies = self.copies.get(adapter_name)
        if copies is None or not all(torch.equal(copies[name], factor) for name, factor in factors.items()):
            self.copies[adapter_name] = {name: factor.detach().clone() for name, factor in factors.items()}
        self.num_merged[adapter_name] += 1
        return self.copies[adapter_name]

    def take_out(self, adapter_name: str) -> None:
        """Count one layer less, and drop the copies after the last one."""
        self.num_merged[adapter_name] -= 1
        if not self.num_merged[adapter_name]:
            del self.num_merged[adapter_name], self.copies[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: PEFT calls this on every tuner layer, and the `FacTLinear` layers merge."""

    def unmerge(self) -> None:
        """Do nothing, as in `merge`."""

    def extra_repr(self) -> str:
        return f"slices of {self.in_features}x{self.out_features}"


def announce(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Tell the stacks of `model` that the state dict that begins will contain them; a hook of ``nn.Module``."""
    factors = getattr(model, FACTORS, None)
    for stack in factors.values() if isinstance(factors, SharedFactors) else []:
        cast(FacTStack, stack).announced = True


def warn_if_alone(adapter_name: str, slices: Slices, stack: FacTStack, prefix: str) -> None:
    """Warn at the last layer of an adapter if a state dict has all its layers and will not have its factors.

    The factors belong to the adapted model, whose hook `announce` tells its stacks before its state dict is made. The
    state dict of a part lacks a stack that was not told. Only a part with all adapted layers warns, since accelerate
    asks single blocks for state dicts that are not saved.

    `slices` are those of the layer that has just been added to the state dict, whose keys begin with `prefix`.
    """
    if stack.announced:
        return
    all_slices = stack.configs[adapter_name].slices
    if slices != next(reversed(cast("dict[str, Slices]", all_slices).values())):
        return
    names = [name.split(".") for name in all_slices]
    # From the innermost module with all layers to the last layer; the key of a layer in a smaller part is shorter.
    in_common = (depth for depth, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1)
    shortest = len(names[-1]) - next(in_common, len(names[-1]) - 1)
    if prefix.count(".") >= shortest:
        warnings.warn(
            f"This state dict of a part of an adapted model lacks the factors of adapter {adapter_name!r}, which "
            "belong to the whole model. Save the whole model, or call merge_and_unload() before you save the part.",
            stacklevel=2,
        )
