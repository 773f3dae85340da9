"""Makes FacT known to PEFT. The only lines of the package that touch PEFT's private mappings.

PEFT dispatches on members of the enum `PeftType` and offers no entry point for methods from outside, so a real member
is added to the enum: it pickles, iterates, compares and prints as the built-in ones do.
"""

import functools
import inspect
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin

from ..storage.replacing import finish_replacing
from .config import FacTConfig, packs_numbers
from .contents import check_contents, check_saved_adapter, saved_tensors
from .mismatch import heeding_mismatch
from .planning import plan
from .stored import from_storage

NAME = "FACT"
# Whether transformers' load_adapter is at work, which copies tensors by name and knows none of packed numbers.
_copying_by_name: ContextVar[bool] = ContextVar("copying_by_name", default=False)


class PackedAdapter(Exception):
    """What transformers' load_adapter was about to load has packed numbers; nothing has been changed yet."""

    def __init__(self, config: FacTConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.tensors = config, tensors


def add_peft_type() -> None:
    """Add the member ``PeftType.FACT`` unless the enum has one."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    vars(member).update(_name_=NAME, _value_=NAME, __objclass__=PeftType, _sort_order_=len(PeftType))
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register(config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Register the method. Doing it again, as a reloaded module does, replaces our own classes.

    Warns:
        UserWarning: If PEFT itself, or another package, already has a method of this name. It stays in place.
    """
    add_peft_type()
    fact = PeftType(NAME)
    present = PEFT_TYPE_TO_TUNER_MAPPING.get(fact)
    if present is not None and present.__module__.partition(".")[0] != __name__.partition(".")[0]:
        warnings.warn(
            f"{present.__module__} already provides PeftType.{NAME} (peft {peft.__version__}); fact_peft leaves it in "
            "place and its FacTConfig will not work in this process. Use that implementation, or a version of peft "
            "without it.",
            stacklevel=2,
        )
        return
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(fact, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    check_adapters_before_they_load()


def check_adapters_before_they_load() -> None:
    """Have what PEFT and transformers load as a FacT adapter checked before a model is touched.

    And an interrupted save finished before it is read, see `storage/replacing.py`.

    All of PEFT reads the config of a saved adapter with ``PeftConfig.from_pretrained``, and so does transformers, which
    then injects the layers and copies whatever the file has a name for, with no hook between. Where the file's numbers
    are packed, it is therefore called again with the config and the unpacked tensors.
    """
    read_config = inspect.unwrap(PeftConfig.from_pretrained.__func__)  # type: ignore[attr-defined]
    load_adapter = inspect.unwrap(PeftAdapterMixin.load_adapter)
    parameters = inspect.signature(load_adapter)

    @functools.wraps(read_config)
    def read_config_and_check(cls: type[PeftConfig], adapter: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        finish_replacing(Path(adapter, subfolder or ""))
        config = read_config(cls, adapter, subfolder=subfolder, **kwargs)
        if isinstance(config, FacTConfig):
            download, _, _ = cls._split_kwargs(kwargs)
            check_saved_adapter(config, str(adapter), subfolder, **download)
            if _copying_by_name.get() and packs_numbers(config):
                raise PackedAdapter(config, saved_tensors(str(adapter), subfolder, **download))
        return config

    @functools.wraps(load_adapter)
    def check_and_load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs)
        config, tensors = given.arguments.get("peft_config"), given.arguments.get("adapter_state_dict")
        adapter_kwargs = given.arguments.get("adapter_kwargs") or {}
        if config is None and tensors is None:
            token = _copying_by_name.set(True)
            try:
                return load_adapter(self, *args, **kwargs)
            except PackedAdapter as packed:
                given.arguments.update(peft_config=packed.config, adapter_state_dict=packed.tensors)
            finally:
                _copying_by_name.reset(token)
        elif isinstance(config, FacTConfig):
            settled = plan(config, self).config
            if tensors is None:
                folder, download = (
                    str(given.arguments.get("peft_model_id")),
                    PeftConfig._split_kwargs(adapter_kwargs)[0],
                )
                check_saved_adapter(settled, folder, **download)
                tensors = saved_tensors(folder, **download) if packs_numbers(settled) else None
            else:
                check_contents(settled, tensors.items(), "adapter_state_dict")
                tensors = {name: from_storage(name, tensor) for name, tensor in tensors.items()}
            given.arguments["adapter_state_dict"] = tensors
        return load_adapter(*given.args, **given.kwargs)

    PeftConfig.from_pretrained = classmethod(read_config_and_check)  # type: ignore[method-assign, assignment]
    PeftAdapterMixin.load_adapter = heeding_mismatch(check_and_load_adapter)  # type: ignore[method-assign]
    load_onto = inspect.unwrap(PeftModel.from_pretrained.__func__)  # type: ignore[attr-defined]
    PeftModel.from_pretrained = classmethod(heeding_mismatch(load_onto))  # type: ignore[method-assign, assignment]
    PeftModel.load_adapter = heeding_mismatch(inspect.unwrap(PeftModel.load_adapter))  # type: ignore[method-assign]
