"""The configuration of a FacT adapter and every check that needs no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.peft_types import PeftType
from torch import finfo, float32, nn

from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import Slices, slices_of
from ..storage.packing import WIDTHS

# Fields that version 0.1 warns of: left out of the file where they say what it does anyway.
UNKNOWN_TO_0_1 = {"share": "model", "storage": None, "head_storage": None}
# Times the rank: with it cores move as far as U and V do at the rate that suits these (benchmarks/frontier).
ORTHOGONAL_SCALE = 32.0
MAX_RANK = 2**31 - 1
STORAGES = ("float32", "float16", "bfloat16", *(f"int{bits}" for bits in WIDTHS))


@dataclass
class FacTConfig(PeftConfig):
    """Configuration of FacT, Factor-Tuning (Jie & Deng, AAAI 2023, arXiv 2212.03145).

    The increments of all targeted linear layers of one width are one tensor, factorized as ``dW_k = scale * U Sigma_k
    V^T`` with U and V shared by all layers. A ViT-B/16 gets 61,440 trainable parameters at the default rank of 16, and
    8,448 at rank 4.

    This is what a user asks for, and it may serve several models: none changes it. What it means for one of them, with
    nothing left open, is that model's own copy, ``model.peft_config[adapter_name]``.

    Args:
        rank: Rank r of the factors, at least 1 and at most the width of the narrowest targeted layer.
        decomposition: ``"tt"``, tensor-train (eq. 8): one r x r core per slice. ``"tk"``, Tucker (eq. 10): the cores
            are mixtures of r shared ones, which takes fewer parameters at equal rank. ``"cp"``, canonical polyadic,
            not in the paper: the cores are diagonal, which takes the fewest.
        scale: Factor s in front of the increment, not zero, and neither too large nor too small for a float32. Acts
            like a learning rate on the factors. None: 32 / rank with the orthogonal start, else 1; a number from then
            on. The paper searches 0.01, 0.1, 1, 10 and 100 per task, with the authors' start.
        fact_dropout: Dropout probability in [0, 1) on the r-dimensional activation between core and V.
        target_modules: Linear layers to adapt, as in every PEFT method: name suffixes, one regex that matches whole
            names, or ``"all-linear"``. None: all linear layers inside the repeated transformer blocks, found by
            structure. Of a layer that makes queries, keys and values in one, ``"qkv.q"``, ``"qkv.k"`` and ``"qkv.v"``
            are the parts, or ``"in_proj.q"``... in ``nn.MultiheadAttention``: what is left out has no cores.
        exclude_modules: Layers not to adapt, or parts of fused ones, as name suffixes or one regex.
        layers_to_transform: Index or indices of the blocks to adapt; None for all.
        layers_pattern: Name of the block container (such as ``"layers"``) that `layers_to_transform` counts in.
        share: ``"model"``: one U and V (and in Tucker form one C) for all slices of one shape, as the method defines.
            ``"block"``: every transformer block has its own, and a ViT-B/16 of rank 8 156,672 parameters.
        modules_to_save: Modules trained in full and saved with the adapter. None: the classifier of a classification
            model, as the method defines; ``[]``: none.
        bias: Which biases to train: ``"none"``, ``"all"``, or ``"fact_only"`` for those of the adapted layers.
        fan_in_fan_out: As in LoRA, whether the adapted layers store their weight as (in, out). transformers' ``Conv1D``
            does and is recognised; for an ``nn.Linear`` True is put right with a warning.
        init_weights: ``"orthogonal"``: orthonormal columns in U and V and zero cores, so that an untrained adapter
            changes nothing; why it is the default is in docs/choosing.md. True: the authors' initialisation, V = 0,
            which changes nothing either. False: every factor random.
        labels: Class names in the order of the logits, saved with the adapter. None: what the model's
            ``config.id2label`` says, if a module of `modules_to_save` has so many outputs.
        storage: In what the factors are saved: ``"float16"``, ``"bfloat16"``, ``"int8"``, ``"int4"``, ``"int2"``, or
            ``"float32"``. Loaded they are floats again, with the numbers of the file. None: as they lie in the model.
        head_storage: The same for `modules_to_save`. None: as `storage`, but in no less than ``"int8"``. What has one
            dimension, such as a bias, is float16 where the rest is integers.
        layout: Which layer owns which slices. Settled when the adapter is created, saved with it, and compared with
            the model when the adapter is loaded; not for users to set.

    Raises:
        ValueError: If a value has the wrong type or is out of its range; the message names argument, value, range and
            a likely fix.
    """

    rank: int = field(default=16, metadata={"help": "Rank r of the factors."})
    decomposition: str = field(
        default="tt",
        metadata={"help": " or ".join(f"{name!r} ({member.title})" for name, member in DECOMPOSITIONS.items())},
    )
    scale: float = field(  # type: ignore[assignment]  # a number from `__post_init__` on
        default=None,
        metadata={"help": "Factor s in front of the increment. None: 32 / rank with the orthogonal start, else 1."},
    )
    fact_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability on the activation between core and V."}
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers to adapt: name suffixes, a regex, or 'all-linear'. "
            "None: all linear layers inside the repeated transformer blocks."
        },
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Layers not to adapt: name suffixes or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the block container that layers_to_transform counts in."}
    )
    share: Literal["model", "block"] = field(
        default="model", metadata={"help": "Who shares U and V: all layers ('model') or those of each block ('block')."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved. None: the classifier, if there is one. []: none."},
    )
    bias: Literal["none", "all", "fact_only"] = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'fact_only'."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "True if the adapted layers store their weight as (in, out)."}
    )
    init_weights: bool | Literal["orthogonal"] = field(
        default="orthogonal",
        metadata={
            "help": "'orthogonal': orthonormal U and V, and zero cores, so dW = 0 at the start. True: as the authors, "
            "V = 0, so dW = 0 too. False: every factor random."
        },
    )
    labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Class names in the order of the logits. None: those of the model's config, if its head fits."
        },
    )
    storage: str | None = field(
        default=None, metadata={"help": f"In what factors are saved: {', '.join(STORAGES)}. None: as they are."}
    )
    head_storage: str | None = field(
        default=None, metadata={"help": "The same for modules_to_save. None: as storage, but in no less than int8."}
    )
    layout: list[str] | None = field(
        default=None, metadata={"help": "Which layer owns which slices; settled when the adapter is created."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("FACT")
        for name in ("target_modules", "exclude_modules"):
            self._check_names(name, "one regex")
            if isinstance(getattr(self, name), str):
                self._check_regexes(name)
            elif isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self._check_names("modules_to_save")
        self._check_regexes("modules_to_save")
        for name in ("base_model_name_or_path", "revision"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a string; pass a name, or None.")
        self._check_rank()
        self._check_choice("decomposition", tuple(DECOMPOSITIONS))
        self._check_choice("bias", ("none", "all", "fact_only"))
        self._check_choice("share", ("model", "block"))
        if not isinstance(self.init_weights, bool) and self.init_weights != "orthogonal":
            raise ValueError(
                f"init_weights={self.init_weights!r} is unknown; choose 'orthogonal' (zero cores), True (V = 0) or "
                "False (every factor random)."
            )
        if self.scale is None:
            self.scale = ORTHOGONAL_SCALE / self.rank if self.init_weights == "orthogonal" else 1.0
        self._check_number("scale")
        if self.scale == 0:
            raise ValueError("scale=0 switches the adapter off for good; use a scale in [0.01, 100], or leave it out.")
        limits = finfo(float32)
        if not limits.tiny <= abs(self.scale) <= limits.max:
            raise ValueError(
                f"scale={self.scale!r} does not fit a float32, which ranges from {limits.tiny:.1e} to "
                f"{limits.max:.1e}; use a scale in [0.01, 100], or leave it out."
            )
        self._check_number("fact_dropout")
        if not 0 <= self.fact_dropout < 1:
            raise ValueError(
                f"fact_dropout={self.fact_dropout!r} is not a probability in [0, 1); the paper uses 0.1, 0.0 is off."
            )
        if not isinstance(self.fan_in_fan_out, bool):
            raise ValueError(f"fan_in_fan_out={self.fan_in_fan_out!r} is not a bool; pass True or False.")
        if self.labels is not None and (
            not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels)
        ):
            raise ValueError(f"labels={self.labels!r} is not a list of strings; pass one class name per logit.")
        self.check_storage()
        self._check_layer_selection()
        if self.layout is not None:
            if not isinstance(self.layout, list) or not all(isinstance(line, str) for line in self.layout):
                raise ValueError(f"layout={self.layout!r} is not a list of strings; leave it None for a new adapter.")
            slices_of(tuple(self.layout), self.share)

    @property
    def slices(self) -> Mapping[str, Slices]:
        """The slices by layer name; none as long as no model has settled the layout."""
        return slices_of(tuple(self.layout or ()), self.share)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved: sets as sorted lists, so that equal configs make equal files."""
        fields = super().to_dict()
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in fields.items()
            if name not in UNKNOWN_TO_0_1 or value != UNKNOWN_TO_0_1[name]
        }

    def check_storage(self) -> None:
        """Check `storage` and `head_storage`, which may be changed at any time.

        Raises:
            ValueError: If there is no such storage.
        """
        for name in ("storage", "head_storage"):
            if getattr(self, name) is not None:
                self._check_choice(name, STORAGES)

    @property
    def storage_of_heads(self) -> str | None:
        """`head_storage`, or what it is by default."""
        return self.head_storage or ("int8" if bits_of(self.storage) else self.storage)

    def _check_rank(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise ValueError(
                f"rank={self.rank!r} is not an integer; pass a whole number of at least 1, such as rank=8."
            )
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} is less than 1; pass a whole number of at least 1, such as rank=8.")
        if self.rank > MAX_RANK:
            raise ValueError(
                f"rank is more than {MAX_RANK}, wider than any layer; pass at most the width of the narrowest targeted "
                "one, such as rank=8."
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}={value!r} is not a number; pass a float.")
        try:
            finite = math.isfinite(value)
        except OverflowError:
            raise ValueError(f"{name} is an integer too large for a float; pass an ordinary float.") from None
        if not finite:
            raise ValueError(f"{name}={value!r} is not finite; pass an ordinary float.")

    def _check_names(self, name: str, alternative: str = "") -> None:
        """Check a field that is a list of names of modules, or in place of the list an `alternative`, one string."""
        value = getattr(self, name)
        if value is None or (alternative and isinstance(value, str) and value):
            return
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(part, str) and part for part in value):
            raise ValueError(
                f"{name}={value!r} is not a list of names{' or ' if alternative else ''}{alternative}, none of them "
                f"empty; pass a list such as {name}=['{value if isinstance(value, str) and value else 'name'}'], or "
                "None."
            )

    def _check_regexes(self, name: str) -> None:
        """Check what PEFT matches as a regex: one string, and all names of some fields."""
        value = getattr(self, name)
        for pattern in [value] if isinstance(value, str) else value or []:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{name}={value!r} is no regex, as which PEFT reads it: {error}; put a backslash before characters "
                    "that are meant literally."
                ) from error

    def _check_layer_selection(self) -> None:
        self._check_names("layers_pattern", "one name")
        self._check_regexes("layers_pattern")
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [indices]:
            if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
                raise ValueError(
                    f"layers_to_transform={indices!r} is neither an integer nor a list of them; pass the indices of "
                    "the blocks to adapt, such as [0, 1]."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the block indices to adapt; "
                "pass both or neither."
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            if self.layers_to_transform is not None:
                raise ValueError(
                    f"layers_to_transform={self.layers_to_transform!r} cannot be combined with the regex "
                    f"target_modules={self.target_modules!r}; name the blocks in the regex instead."
                )


def bits_of(storage: str | None) -> int | None:
    """Bits of a number in a storage that packs numbers, else None."""
    return int(storage.removeprefix("int")) if storage and storage.startswith("int") else None


def packs_numbers(config: FacTConfig) -> bool:
    """Whether the file of an adapter holds packed numbers."""
    return bits_of(config.storage) is not None or bits_of(config.storage_of_heads) is not None


@contextmanager
def stored_as(config: FacTConfig, storage: str | None, head_storage: str | None = None) -> Iterator[None]:
    """Have an adapter be saved in another storage than its config says, for the time of the block.

    Raises:
        ValueError: If there is no such storage.
    """
    replace(config, storage=storage, head_storage=head_storage)  # for its checks
    before = config.storage, config.head_storage
    config.storage, config.head_storage = storage, head_storage
    try:
        yield
    finally:
        config.storage, config.head_storage = before


def fact_config(model: nn.Module, adapter_name: str) -> FacTConfig:
    """The config of a FacT adapter of `model`.

    Raises:
        ValueError: If `model` has no adapter of this name, or it is one of another method.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name={adapter_name!r} does not exist; the adapters are {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, FacTConfig):
        raise ValueError(f"adapter_name={adapter_name!r} is not a FacT adapter but one of {config.peft_type}.")
    return config
