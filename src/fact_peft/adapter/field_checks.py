"""Checks of single fields of `FacTConfig`: type and range. All raise ValueError."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import finfo, float32

MAX_RANK = 2**31 - 1


def check_rank(rank: Any) -> None:
    """Refuse what is not a whole number from 1 to `MAX_RANK`."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank={rank!r} is not an integer; pass a whole number of at least 1, such as rank=8.")
    if rank < 1:
        raise ValueError(f"rank={rank} is less than 1; pass a whole number of at least 1, such as rank=8.")
    if rank > MAX_RANK:
        raise ValueError(
            f"rank is more than {MAX_RANK}, wider than any layer; pass at most the width of the narrowest targeted "
            "one, such as rank=8."
        )


def check_scale(scale: Any) -> None:
    """Refuse what is not a number, zero, or outside the range of a float32."""
    check_number("scale", scale)
    if scale == 0:
        raise ValueError("scale=0 switches the adapter off for good; use a scale in [0.01, 100], or leave it out.")
    limits = finfo(float32)
    if not limits.tiny <= abs(scale) <= limits.max:
        raise ValueError(
            f"scale={scale!r} does not fit a float32, which ranges from {limits.tiny:.1e} to {limits.max:.1e}; use a "
            "scale in [0.01, 100], or leave it out."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number; pass a float.")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer too large for a float; pass an ordinary float.") from None
    if not finite:
        raise ValueError(f"{name}={value!r} is not finite; pass an ordinary float.")


def check_names(name: str, value: Any, alternative: str = "") -> None:
    """Refuse what is neither None nor a list of names of modules, nor the `alternative`, which is one string."""
    if value is None or (alternative and isinstance(value, str) and value):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(part, str) and part for part in value):
        raise ValueError(
            f"{name}={value!r} is not a list of names{' or ' if alternative else ''}{alternative}, none of them "
            f"empty; pass a list such as {name}=['{value if isinstance(value, str) and value else 'name'}'], or None."
        )


def check_regexes(name: str, value: str | Iterable[str] | None) -> None:
    """Refuse what PEFT cannot match as a regex: one string, or every name of a list."""
    for pattern in [value] if isinstance(value, str) else value or []:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{name}={value!r} is no regex, as which PEFT reads it: {error}; put a backslash before characters "
                "that are meant literally."
            ) from error


def check_layer_selection(target_modules: Any, layers_to_transform: Any, layers_pattern: Any) -> None:
    """Refuse block indices that are no integers, and combinations that PEFT would ignore."""
    check_names("layers_pattern", layers_pattern, "one name")
    check_regexes("layers_pattern", layers_pattern)
    for index in layers_to_transform if isinstance(layers_to_transform, (list, tuple)) else [layers_to_transform]:
        if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
            raise ValueError(
                f"layers_to_transform={layers_to_transform!r} is neither an integer nor a list of them; pass the "
                "indices of the blocks to adapt, such as [0, 1]."
            )
    if layers_pattern and layers_to_transform is None:
        raise ValueError(
            f"layers_pattern={layers_pattern!r} needs layers_to_transform, the block indices to adapt; pass both or "
            "neither."
        )
    if isinstance(target_modules, str) and target_modules.lower() != "all-linear" and layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={layers_to_transform!r} cannot be combined with the regex "
            f"target_modules={target_modules!r}; name the blocks in the regex instead."
        )
