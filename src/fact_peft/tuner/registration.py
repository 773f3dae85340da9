"""Makes FacT known to PEFT. The only lines of the package that touch PEFT's private mappings.

PEFT dispatches on members of the enum `PeftType` and offers no entry point for methods from outside, so a real member
is added to the enum: it pickles, iterates, compares and prints as the built-in ones do.
"""

import warnings

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

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
