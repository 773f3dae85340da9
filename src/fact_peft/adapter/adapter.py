"""An adapter as a value, apart from any model: config, factors and head, complete and checked."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.heads import current_labels
from ..architecture.linears import uncompiled, unwrapped
from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import Slices
from .config import FacTConfig, fact_config
from .files import find_folder, read_tensors, replacing_files, write_files
from .names import PREFIX, by_key, mark_local_folder
from .storage import exact_numbers, to_storage
from .validation import check_pair, record, sort_tensors


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, which is read from disk, taken out of a model or computed, and is written or put into a model.

        adapter = Adapter.read("my-adapter")        # a folder or a Hub id; adapter.write(folder) is the inverse
        adapter = Adapter.of(model, "default")      # adapter.attach(model, "default") is the inverse

    An object is complete and consistent as soon as it exists, and is not changed afterwards.

    Attributes:
        config: Its configuration, with targets, heads, labels and layout settled. Do not change it; see `replace`.
        factors: The factors by stack and paper letter, such as ``factors["768x768"]["U"]``, as floats.
        others: Every other trained tensor by its name in the base model: the head and biases.
    """

    config: FacTConfig
    factors: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.config.saved_others = frozenset(self.others)

    @classmethod
    def read(
        cls, folder_or_hub_id: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> Adapter:
        """Read a saved adapter.

        Args:
            folder_or_hub_id: Its folder, or its name on the Hub, from which it is downloaded.
            revision: Branch, tag or commit of the repository on the Hub.
            token: Hub token.

        Raises:
            ValueError: If it is an adapter of another method, or a file is damaged, renamed or missing.
        """
        folder = find_folder(os.fspath(folder_or_hub_id), [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME], revision, token)
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} has no {CONFIG_NAME}; pass the folder that an adapter was saved in.")
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder / CONFIG_NAME} is not the config of an adapter ({type(error).__name__}: {error}); take it "
                "from where the adapter was saved."
            ) from error
        if not isinstance(config, FacTConfig):
            raise ValueError(
                f"{folder_or_hub_id} is not a FacT adapter but one of {config.peft_type}; only FacT's are read here."
            )
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if not file.is_file():
            raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter there again.")
        check_pair(config, file)
        return cls.from_state_dict(config, read_tensors(file), str(file))

    @classmethod
    def from_state_dict(
        cls,
        config: FacTConfig,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        source: str = "The state dict",
    ) -> Adapter:
        """Make an adapter of its config and of what ``get_peft_model_state_dict`` returns.

        Args:
            config: Its config, with a layout.
            tensors: Tensors by name, packed or not.
            source: Where they come from, for error messages.

        Raises:
            ValueError: If they are not the tensors of such an adapter.
        """
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        return cls(copy.copy(config), *sort_tensors(config, items, source))

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str = "default") -> Adapter:
        """Copy an adapter of `model`, with the exact numbers that it has there.

        Args:
            model: A `PeftModel`, or a model with injected FacT layers.
            adapter_name: Name of the adapter.

        Raises:
            ValueError: If `model` has no such FacT adapter, or it holds NaN or infinity.
        """
        model = uncompiled(model)
        config = copy.copy(fact_config(model, adapter_name))
        config.labels = current_labels(config.labels, model)
        base = unwrapped(model)
        if config.task_type is None:
            config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = mark_local_folder(getattr(base, "name_or_path", None) or None)
        with exact_numbers():
            tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if not is_copied_bias(name)}
        return cls.from_state_dict(config, copies, f"Adapter {adapter_name!r}")

    def attach(self, model: nn.Module, adapter_name: str = "default", is_trainable: bool = False) -> None:
        """Add this adapter to a model, which may have others.

        Args:
            model: A `PeftModel`, where the adapter is not activated; or any other model, which is adapted in place.
            adapter_name: Name of the new adapter.
            is_trainable: Whether it is to be trained further.

        Raises:
            ValueError: If the name is taken, or the model has other layers or another head, or a head of which this
                adapter has no numbers. The model is then as it was.
        """
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose another name or delete it first.")
        config = copy.copy(self.config)
        config.inference_mode = not is_trainable
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        elif isinstance(model, PreTrainedModel):
            model.add_adapter(config, adapter_name)
        else:
            inject_adapter_in_model(config, model, adapter_name)
        self.fill(model, adapter_name)

    def fill(self, model: nn.Module, adapter_name: str = "default") -> None:
        """Copy the numbers into an adapter of the same layout that `model` has already; the scale there stays.

        Raises:
            ValueError: If the adapter there has other layers, another rank or another head.
        """
        model = uncompiled(model)
        tensors = fact_config(model, adapter_name).renaming.tensors(self.state_dict())
        if not isinstance(model, PeftModel):  # PEFT looks heads up by their names in the model
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by their names in an adapter file, as floats."""
        return {f"{PREFIX}{name}": tensor for name, tensor in {**by_key(self.factors), **self.others}.items()}

    def stored(self) -> dict[str, Tensor]:
        """As `state_dict`, in the data types of `FacTConfig.storage` and `FacTConfig.head_storage`."""
        config, heads = self.config, {f"{PREFIX}{name}" for name in self.others}
        return {
            name: to_storage(name, tensor, config.storage_of_heads if name in heads else config.storage)
            for name, tensor in self.state_dict().items()
        }

    def write_files(self, folder: Path) -> None:
        """Write the two files of this adapter into a folder that has no other files than its image processor."""
        config = copy.copy(self.config)
        config.inference_mode = True
        write_files(folder, config, self.stored(), record(config, folder))

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Save this adapter, in place of the one that `folder` may hold.

        A process that is killed leaves the old adapter, the new one, or files of both. Reading the latter raises an
        error with the command that completes the save.

        Raises:
            ValueError: If a number does not fit the storage. The folder is then as it was.
        """
        with replacing_files(folder) as staging:
            self.write_files(staging)

    def replace(self, **changes: Any) -> Adapter:
        """The same numbers with another config, such as ``adapter.replace(storage="int8")``."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    @property
    def slices(self) -> Mapping[str, Slices]:
        """The slices of every adapted layer, by the layer's name."""
        return self.config.slices

    @property
    def num_factor_parameters(self) -> int:
        """Numbers in the factors."""
        return sum(factor.numel() for group in self.factors.values() for factor in group.values())

    @property
    def num_other_parameters(self) -> int:
        """Numbers in what is trained beside the factors."""
        return sum(tensor.numel() for tensor in self.others.values())

    def increment_norms(self) -> dict[str, float]:
        """Frobenius norm of dW, scale included, by layer name. Only products of size r are computed."""
        return DECOMPOSITIONS[self.config.decomposition].norms(self.factors, self.slices, self.config.scaling)


def is_copied_bias(name: str) -> bool:
    """Whether this is the name of a copy of a head's bias, which PEFT saves too with ``bias="all"``."""
    *path, last = name.split(".")
    return last == "bias" and not {"modules_to_save", "original_module"}.isdisjoint(path)
