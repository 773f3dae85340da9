"""Checks of single fields of `FacTConfig`: type and range. All raise ValueError."""

import math
import re
import sys
from typing import Any

from torch import finfo, float32

MAX_RANK = 2**31 - 1


def is_integer(value: Any) -> bool:
    """Whether a value is an integer and no bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_rank(rank: Any) -> None:
    """Refuse what is not an integer from 1 to `MAX_RANK`."""
    if not is_integer(rank) or rank < 1:
        problem = "less than 1" if is_integer(rank) else "not an integer"
        raise ValueError(f"rank={rank!r} is {problem}; pass a whole number of at least 1, such as rank=8.")
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
    if not is_integer(value) and not isinstance(value, float):
        raise ValueError(f"{name}={value!r} is not a number; pass a float.")
    if is_integer(value) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is an integer too large for a float; pass an ordinary float.")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite; pass an ordinary float.")


def check_names(name: str, value: Any, alternative: str = "", are_regexes: bool = False) -> None:
    """Refuse what is neither None nor a list of module names, nor the `alternative`, which is one string.

    One string, and every name of a list if `are_regexes`, must be a regex, as which PEFT matches it.
    """
    is_text = isinstance(value, str) and value != ""
    is_names = isinstance(value, (list, tuple, set)) and all(isinstance(part, str) and part for part in value)
    if value is not None and not is_names and not (alternative and is_text):
        raise ValueError(
            f"{name}={value!r} is not a list of names{' or ' if alternative else ''}{alternative}, none of them "
            f"empty; pass a list such as {name}=['{value if is_text else 'name'}'], or None."
        )
    for pattern in [value] if is_text else value if value and are_regexes else []:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{name}={value!r} is no regex, as which PEFT reads it: {error}; put a backslash before characters "
                "that are meant literally."
            ) from error


def check_strings(name: str, value: Any, fix: str) -> None:
    """Refuse what is neither None nor a list of strings."""
    if value is not None and not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        raise ValueError(f"{name}={value!r} is not a list of strings; {fix}.")


def check_layer_selection(target_modules: Any, layers_to_transform: Any, layers_pattern: Any) -> None:
    """Refuse block indices that are no integers, and combinations that PEFT would ignore."""
    check_names("layers_pattern", layers_pattern, "one name", are_regexes=True)
    for index in layers_to_transform if isinstance(layers_to_transform, (list, tuple)) else [layers_to_transform]:
        if index is not None and not is_integer(index):
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
