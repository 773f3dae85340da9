"""Makes FacT known to PEFT. The only lines of the package that touch PEFT's private mappings.

PEFT dispatches on members of the enum `PeftType` and offers no entry point for methods from outside, so a real member
is added to the enum: it pickles, iterates, compares and prints as the built-in ones do.
"""

import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from transformers.integrations.peft import PeftAdapterMixin

from ..storage.replacing import finish_replacing
from .config import FacTConfig
from .contents import check_contents, check_saved_adapter
from .mismatch import heeding_mismatch
from .planning import resolve

NAME = "FACT"


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
    then injects the layers and copies whatever the file has a name for, with no hook between. Tensors that it is given
    by hand pass that by.
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
        return config

    @functools.wraps(load_adapter)
    def check_and_load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        config, tensors = given.get("peft_config"), given.get("adapter_state_dict")
        adapter_kwargs = given.get("adapter_kwargs") or {}
        if isinstance(config, FacTConfig):
            settled, _ = resolve(config, self)
            if tensors is None:
                check_saved_adapter(
                    settled, str(given.get("peft_model_id")), **PeftConfig._split_kwargs(adapter_kwargs)[0]
                )
            else:
                check_contents(settled, tensors.items(), "adapter_state_dict")
        return load_adapter(self, *args, **kwargs)

    PeftConfig.from_pretrained = classmethod(read_config_and_check)  # type: ignore[method-assign, assignment]
    PeftAdapterMixin.load_adapter = heeding_mismatch(check_and_load_adapter)  # type: ignore[method-assign]
    load_onto = inspect.unwrap(PeftModel.from_pretrained.__func__)  # type: ignore[attr-defined]
    PeftModel.from_pretrained = classmethod(heeding_mismatch(load_onto))  # type: ignore[method-assign, assignment]
    PeftModel.load_adapter = heeding_mismatch(inspect.unwrap(PeftModel.load_adapter))  # type: ignore[method-assign]
