"""The configuration of a FacT adapter, and every check of it that needs no model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from peft import PeftConfig
from peft.utils.peft_types import PeftType
from torch import nn

from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import Slices, slices_of
from ..upstream import split_download_arguments
from .field_checks import (
    check_choice,
    check_layer_selection,
    check_names,
    check_number,
    check_rank,
    check_scale,
    check_strings,
)
from .names import UNCHANGED
from .storage import STORAGES, bits_of
from .validation import check_saved_weights

# Norm of the first change of dW from the orthogonal start, per unit of AdamW's learning rate (benchmarks/frontier). It
# is the same for all ranks and decompositions, so that one learning rate fits them all.
ORTHOGONAL_STEP = 32.0
# Arguments of other PEFT methods, and what FacT has in their place.
OTHER_NAMES = {
    "r": "the rank is called rank, as in FacTConfig(rank=8)",
    "alpha": "the factor in front of the increment is called scale, and equals lora_alpha / r of LoRA",
    "lora_alpha": "the factor in front of the increment is called scale, and equals lora_alpha / r of LoRA",
    "dropout": "it is called fact_dropout",
    "lora_dropout": "it is called fact_dropout",
    "init_lora_weights": "it is called init_weights",
    "layer_replication": "FacT cannot repeat layers",
    "use_dora": "FacT has no magnitude vectors, since U and V are shared by all layers",
    "use_rslora": "set scale instead, which is not divided by the rank",
    "rank_pattern": "all layers share U and V and so have one rank; leave layers out with exclude_modules",
    "alpha_pattern": "all layers have one scale",
}


@dataclass
class FacTConfig(PeftConfig):
    """Configuration of FacT, Factor-Tuning (Jie & Deng, AAAI 2023, arXiv 2212.03145).

    The increments of all targeted linear layers of one width form one tensor, which is factorized as ``dW_k = scale * U
    Sigma_k V^T`` with U and V shared by all layers. A ViT-B/16 has 61,440 trainable parameters at the default rank of
    16, and 8,448 at rank 4.

    One config may be used for several models and is not changed by them. Each model has its own copy,
    ``model.peft_config[adapter_name]``, in which targets, heads, labels and layout are settled.

    Args:
        rank: Rank r of the factors, at least 1 and at most the width of the narrowest targeted layer.
        decomposition: ``"tt"``, tensor-train (eq. 8): one r x r core per slice. ``"tk"``, Tucker (eq. 10): every core
            is a mixture of r shared cores, which takes fewer parameters at equal rank. ``"cp"``, canonical polyadic
            (not in the paper): diagonal cores, which take the fewest.
        scale: Factor s in front of the increment, not zero. It acts like a learning rate on the factors. None: with the
            orthogonal start 32 / rank for ``"tt"`` and 32 / sqrt(rank) for ``"tk"`` and ``"cp"``, else 1, also after
            other fields are changed. The paper searches 0.01, 0.1, 1, 10 and 100 per task, with ``init_weights=True``.
        fact_dropout: Dropout probability in [0, 1) on the r-dimensional activation between core and V.
        target_modules: Linear layers to adapt, as in every PEFT method: name suffixes, one regex that matches whole
            names, or ``"all-linear"``. None: all linear layers inside the repeated transformer blocks, found by
            structure. ``"qkv.q"``, ``"qkv.k"`` and ``"qkv.v"`` are the parts of a layer that computes queries, keys and
            values together, and ``"in_proj.q"``... those in ``nn.MultiheadAttention``.
        exclude_modules: Layers, or parts of fused layers, that are not adapted: name suffixes or one regex.
        layers_to_transform: Index or indices of the blocks to adapt; None for all.
        layers_pattern: Name of the block container (such as ``"layers"``) that `layers_to_transform` counts in.
        share: ``"model"``: all slices of one shape share one U and V (and one C in Tucker form), as the method defines.
            ``"block"``: every transformer block has its own; a ViT-B/16 of rank 8 then has 156,672 parameters.
        modules_to_save: Modules that are trained in full and saved with the adapter. None: the classifier of a
            classification model, as the method defines; ``[]``: none.
        bias: Which biases to train: ``"none"``, ``"all"``, or ``"fact_only"`` for those of the adapted layers.
        fan_in_fan_out: As in LoRA, whether the adapted layers store their weight as (in, out). transformers' ``Conv1D``
            does and is recognised.
        init_weights: ``"orthogonal"``: orthonormal columns in U and V and zero cores, so that an untrained adapter
            changes nothing. True: the authors' initialisation with V = 0, which changes nothing either. False: every
            factor is random.
        labels: Class names in the order of the logits, saved with the adapter. None: those of the model's
            ``config.id2label``, if a module of `modules_to_save` has as many outputs.
        storage: Data type of the factors on disk: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"int8"``,
            ``"int4"`` or ``"int2"``. None: that of the model. Loading always gives floats.
        head_storage: Data type of `modules_to_save` on disk. None: as `storage`, but at least ``"int8"``. Tensors of
            one dimension, such as biases, are saved as float16 where an integer type is chosen.
        layout: Which layer owns which slices. It is settled when the adapter is created, saved with it, and compared
            with the model when the adapter is loaded. Users leave it None.

    Raises:
        TypeError: If an argument has the name that another PEFT method gives it, or no name.
        ValueError: If a value has the wrong type or is out of its range.
    """

    rank: int = 16
    decomposition: str = "tt"
    scale: float | None = None
    fact_dropout: float = 0.0
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    share: Literal["model", "block"] = "model"
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "fact_only"] = "none"
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["orthogonal"] = "orthogonal"
    labels: list[str] | None = None
    storage: str | None = None
    head_storage: str | None = None
    layout: list[str] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> FacTConfig:
        """Explain what takes the place of arguments of other methods; a dataclass would only call them unexpected."""
        if args:
            raise TypeError(f"FacTConfig takes arguments by name, got {args[0]!r}; write FacTConfig(rank=8).")
        for name in OTHER_NAMES.keys() & kwargs.keys():
            raise TypeError(f"FacTConfig got an unexpected keyword argument {name!r}: {OTHER_NAMES[name]}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("FACT")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            check_names(name, value, "one regex")
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        check_names("modules_to_save", self.modules_to_save, are_regexes=True)
        check_layer_selection(self.target_modules, self.layers_to_transform, self.layers_pattern)
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a string; pass a name, or None.")
        check_rank(self.rank)
        check_choice("decomposition", self.decomposition, tuple(DECOMPOSITIONS))
        check_choice("bias", self.bias, ("none", "all", "fact_only"))
        check_choice("share", self.share, ("model", "block"))
        if not isinstance(self.init_weights, bool) and self.init_weights != "orthogonal":
            raise ValueError(
                f"init_weights={self.init_weights!r} is unknown; choose 'orthogonal' (zero cores), True (V = 0) or "
                "False (every factor random)."
            )
        self.check_changeable()
        check_number("fact_dropout", self.fact_dropout)
        if not 0 <= self.fact_dropout < 1:
            raise ValueError(
                f"fact_dropout={self.fact_dropout!r} is not a probability in [0, 1); the paper uses 0.1, 0.0 is off."
            )
        if not isinstance(self.fan_in_fan_out, bool):
            raise ValueError(f"fan_in_fan_out={self.fan_in_fan_out!r} is not a bool; pass True or False.")
        check_strings("labels", self.labels, "pass one class name per logit")
        check_strings("layout", self.layout, "leave it None for a new adapter")
        if self.layout is not None:
            slices_of(tuple(self.layout), self.share)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> FacTConfig:
        """Read the config of a saved adapter, and check the weights in its folder.

        PEFT reads the config before it changes the model. So a damaged file is refused before the model is changed.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the adapter.
            subfolder: Subfolder that holds ``adapter_config.json``.
            kwargs: As for ``PeftConfig.from_pretrained``. With ``ignore_mismatched_sizes=True`` a head of another size
                than the model's is left out when the adapter is loaded.

        Raises:
            ValueError: If there is no config, or the weights are damaged, renamed or do not fit it.
        """
        name = os.fspath(pretrained_model_name_or_path)
        config: Any = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        if isinstance(config, FacTConfig):
            download, _, _ = split_download_arguments(kwargs)
            config.saved_others = check_saved_weights(config, name, subfolder, **download)
            config.ignores_mismatched_head = bool(kwargs.get("ignore_mismatched_sizes"))
        return config

    _scale: ClassVar[float | None] = None  # what was set; the field `scale` is a property, see below
    # Not fields: they belong to one loading and are not saved.
    ignores_mismatched_head = False
    renaming = UNCHANGED
    saved_others = cast("frozenset[str] | None", None)  # names of the saved tensors of heads and biases

    @property
    def scaling(self) -> float:
        """`scale` as a plain float."""
        if self._scale is not None:
            return float(self._scale)
        if self.init_weights != "orthogonal":
            return 1.0
        return ORTHOGONAL_STEP / DECOMPOSITIONS[self.decomposition].step_norm(self.rank)

    @property
    def storage_of_heads(self) -> str | None:
        """`head_storage`, or its default."""
        return self.head_storage or ("int8" if bits_of(self.storage) else self.storage)

    @property
    def slices(self) -> Mapping[str, Slices]:
        """The slices by layer name; empty while the layout is None."""
        return slices_of(tuple(self.layout or ()), self.share)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, with the scale as a number, and sets as sorted lists for equal files."""
        fields = {**super().to_dict(), "scale": self.scaling}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def check_changeable(self) -> None:
        """Check what may be changed at any time, scale and storages; raise ValueError if one is wrong."""
        check_scale(self.scale)
        for name in ("storage", "head_storage"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), STORAGES)


class DefaultScale(float):
    """A default scale. A config that is given one, as by `dataclasses.replace`, computes its own default again."""


def get_scale(config: FacTConfig) -> float:
    """Getter of ``config.scale``."""
    return DefaultScale(config.scaling) if config._scale is None else config._scale


def set_scale(config: FacTConfig, scale: float | None) -> None:
    """Setter of ``config.scale``."""
    vars(config)["_scale"] = None if isinstance(scale, DefaultScale) else scale


# A property, so that a scale that is not set follows `rank` and `init_weights` when they change.
FacTConfig.scale = property(get_scale, set_scale)  # type: ignore[assignment]


def fact_config(model: nn.Module, adapter_name: str) -> FacTConfig:
    """The config of a FacT adapter of `model`; a ValueError if it has no adapter of this name, or not of FacT."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name={adapter_name!r} does not exist; the adapters are {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, FacTConfig):
        raise ValueError(f"adapter_name={adapter_name!r} is not a FacT adapter but one of {config.peft_type}.")
    return config
