"""Whether an adapter may be loaded whose head has another size than the model's: ``ignore_mismatched_sizes=True``.

PEFT and transformers take that word at their loaders and do not hand it on to the method, which here decides on labels
and head before anything is copied. So it is remembered for the time of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_ignored: ContextVar[bool] = ContextVar("mismatched_heads_are_ignored", default=False)


def mismatched_heads_are_ignored() -> bool:
    """Whether the caller of the loader that is at work wants to keep the model's own head if the saved one differs."""
    return _ignored.get()


def heeding_mismatch(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of PEFT or transformers that remembers its ``ignore_mismatched_sizes`` while it works."""

    @functools.wraps(load)
    def loader(*args: Any, **kwargs: Any) -> Any:
        # transformers' from_pretrained has it in a load_config.
        default = getattr(kwargs.get("load_config"), "ignore_mismatched_sizes", False)
        token = _ignored.set(bool(kwargs.get("ignore_mismatched_sizes", default)))
        try:
            return load(*args, **kwargs)
        finally:
            _ignored.reset(token)

    return loader
