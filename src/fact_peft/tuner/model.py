"""The tuner: plans which layers own which slices, creates the shared factors, and wraps the layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.other import _set_adapter as activate_heads
from torch import Tensor, nn

from ..architecture.labels import current_labels
from ..architecture.linears import replace_everywhere
from ..architecture.multihead import close_attentions, open_attentions
from ..method.tensorization import stack_sizes
from ..storage.adapter_file import is_finite
from ..storage.quoting import for_terminal
from .call import calling_with, current_batch
from .combination import combined_config, fill_with_sum
from .config import FacTConfig, fact_config
from .contents import split_off_foreign
from .factors import FACTORS, FacTLayer, FacTStack, SharedFactors, ordinary_tensors
from .head import FacTHead, adopt_heads
from .layer import FacTLinear
from .mismatch import mismatched_heads_are_ignored
from .mixed_batch import mixed_batch
from .planning import check_adapter_name, is_targeted, resolve
from .stored import from_storage, to_storage_together


class FacTModel(BaseTuner):
    """Adapts a model with FacT; made by ``get_peft_model(model, FacTConfig(...))``.

    The targeted linear layers become `FacTLinear`; the factors they share are registered once on the adapted model, as
    ``model.factors``.

    Raises:
        NoMatchingPeftModuleError: If no layer of the model is targeted.
        ValueError: If a target is not a linear layer, the rank exceeds a layer's width, the config belongs to an
            adapter of other layers, or the adapter's name is not fit for one. Model and config are then as they were.
    """

    prefix = "fact_"
    tuner_layer_cls = FacTLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)

    @ordinary_tensors()
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan on names and shapes alone, then create the factors and wrap the layers; see `BaseTuner`.

        `state_dict` is not looked at: the layers follow from the config and its layout.
        """
        asked = self.peft_config[adapter_name]
        assert isinstance(asked, FacTConfig)
        try:
            check_adapter_name(adapter_name)
            check_not_merged(model, adapter_name, "replaced")
            config, self._plan = resolve(asked, model)
        except Exception:
            self._restore_config(adapter_name)
            raise
        self.peft_config[adapter_name] = config
        self._forget(adapter_name)
        open_attentions(model, self._plan)
        targets, in_part = config.target_modules, any(owned.parts for owned in self._plan.values())
        with warnings.catch_warnings():
            if in_part:  # of which PEFT sees nothing excluded
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        replace_everywhere(
            model, {layer.base_layer: layer for layer in self._linears()}
        )  # PEFT replaces it in one place
        if in_part:  # PEFT shortens long lists to what tells modules apart, but not their parts
            config.target_modules = targets
        adopt_heads(model, getattr(model, FACTORS).configs)
        if adapter_name in self.active_adapters:
            for wrapper in self._heads():  # PEFT activates a new head only where there was none
                if adapter_name in wrapper.modules_to_save and not wrapper.active_adapters:
                    wrapper.set_adapter(adapter_name, inference_mode=asked.inference_mode)

    def _restore_config(self, adapter_name: str) -> None:
        """After a refusal: the config of the adapter that the model has under this name, or none."""
        del self.peft_config[adapter_name]
        configs = getattr(self.model, FACTORS, SharedFactors()).configs
        if adapter_name in configs:
            self.peft_config[adapter_name] = configs[adapter_name]

    def _forget(self, adapter_name: str) -> None:
        """Drop an earlier adapter of this name, as when a notebook's cell is run again: the new one starts afresh."""
        for module in self.model.modules():
            if isinstance(module, FacTLayer):
                module.forget(adapter_name)
        for wrapper in self._heads():
            others = [name for name in wrapper.active_adapters if name != adapter_name]
            wrapper.delete_adapter(adapter_name, new_active_adapters=others)
        self._drop_empty_stacks()

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, FacTConfig)
        return key in peft_config.slices or is_targeted(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, FacTConfig)
        slices = self._plan[current_key]
        if not hasattr(self.model, FACTORS):
            setattr(self.model, FACTORS, SharedFactors())
        stack = getattr(self.model, FACTORS).stack_for(slices)
        if adapter_name not in stack.fact_U:
            stack.add_adapter(adapter_name, peft_config, stack_sizes(self._plan.values())[slices.stack])
        if not isinstance(target, FacTLinear):
            layer = FacTLinear(target, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, slices, stack)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also moves parameters over, of which FacT's layers have none, and fails on a head without a weight.
        setattr(parent, child_name, new_module)

    def _linears(self) -> Iterator[FacTLinear]:
        return (module for module in self.model.modules() if isinstance(module, FacTLinear))

    def _heads(self) -> Iterator[ModulesToSaveWrapper]:
        return (module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper))

    def _stacks(self) -> Iterator[FacTStack]:
        return (module for module in self.model.modules() if isinstance(module, FacTStack))

    @ordinary_tensors()
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes new parameters, which all require gradients; those of an adapter loaded for inference must not.
        trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable[name])
        for head in self.model.modules():
            if autocast_adapter_dtype and isinstance(head, FacTHead):
                head.to_float32(adapter_name)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Change the scale s of an adapter, also after training; it is saved with the adapter.

        Raises:
            ValueError: If there is no such adapter, it is merged, or `scale` is no number, zero or not finite.
        """
        config = fact_config(self, adapter_name)
        if scale is None:
            raise ValueError("scale=None is not a number; pass a float, such as 1.0.")
        replace(config, scale=scale)  # for its checks
        check_not_merged(self.model, adapter_name, "scaled")
        config.scale = float(scale)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the adapter whose increments are the weighted sum of those of others, exactly.

        The new adapter is a tensor-train one whose rank is the sum of theirs, whatever their decompositions, scales
        and layers. Heads are summed as what each adapter changed on top of the original head.

        Args:
            adapters: Names of the adapters to sum.
            weights: Their weights, in the same order; negative ones subtract.
            adapter_name: Name of the new adapter. It is not activated.

        Raises:
            ValueError: If an adapter is unknown, the new name is taken, the lengths differ, a weight is not finite, or
                the ranks add up to more than a layer's width.
        """
        if len(adapters) != len(weights) or not adapters or len(set(adapters)) < len(adapters):
            raise ValueError(f"adapters={adapters!r} and weights={weights!r} must be one weight per distinct adapter.")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights={weights!r} must be finite numbers.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose another name or delete it first.")
        configs = {name: fact_config(self, name) for name in adapters}
        self.peft_config[adapter_name] = combined_config(self.model, configs)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        self._cast_adapter_dtype(adapter_name)
        ranks = [config.rank for config in configs.values()]
        fill_with_sum(self.model, adapter_name, dict(zip(adapters, weights, strict=True)), ranks)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the stacks that no other adapter uses.

        If it was the only active one, the first of the others by name is active from then on, in every layer.

        Raises:
            ValueError: If there is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist.")
        check_not_merged(self.model, adapter_name, "deleted")
        del self.peft_config[adapter_name]
        self._forget(adapter_name)
        if adapter_name not in self.active_adapters:
            return
        # PEFT lets each layer choose among its own adapters, so that layers of different adapters would disagree.
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.peft_config:
            active = [min(self.peft_config)]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
        for module in self.model.modules():
            if isinstance(module, FacTLayer):
                module.set_adapter(active)
        if active:
            activate_heads(self.model, active)
        self.active_adapter = active

    def _drop_empty_stacks(self) -> None:
        stacks = getattr(self.model, FACTORS, {})
        for name in [name for name, stack in stacks.items() if not stack.fact_U]:
            del stacks[name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add increments to the base weights; see `BaseTuner.merge_adapter`. A refused merge changes nothing."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        replace_everywhere(self.model, {layer: layer.base_layer for layer in self._linears()})
        if hasattr(self.model, FACTORS):
            delattr(self.model, FACTORS)
        close_attentions(self.model)
        return self.model

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise before the first layer is merged rather than at the first bad one.

        Raises:
            ValueError: If a weight cannot take an increment, two layers share one, or with `safe_merge`, if a merged
                weight would not be finite.
        """
        owners: dict[int, str] = {}
        for path, layer in self.model.named_modules():
            if not isinstance(layer, FacTLinear):
                continue
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in layer.fact_slices]
            weight = getattr(layer.get_base_layer(), "weight", None)
            owner = owners.setdefault(id(weight), path) if names and weight is not None else path
            reason = layer.why_not_mergeable() if names else None
            if owner != path:
                reason = (
                    f"it shares its weight with {owner}, and one weight cannot hold two increments; untie them first"
                )
            if reason:
                raise ValueError(f"An increment cannot be merged into {path}: {reason}.")
            for name in names if safe_merge else ():
                layer.merged_weight(name, check=True)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is not None:
            with mixed_batch(self.model, adapter_names, args, kwargs):
                yield
        elif current_batch() is not None:  # called inside another call, but not with its adapters
            with calling_with(None):
                yield
        else:
            yield

    # How an adapter goes to disk and comes back.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, FacTConfig)
        config.labels = current_labels(config.labels, model)
        config.check_storage()
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return to_storage_together(config, adapter_name, tensors)

    @classmethod
    @ordinary_tensors()
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As `BaseTuner`, and refuse what does not fit or is no part of the adapter before the first tensor is copied.

        Raises:
            ValueError: If a factor is missing, not of floats or not finite, a factor or head has another shape than in
                the model or is packed wrongly, or there are tensors of other names.
        """
        assert isinstance(config, FacTConfig)
        check_not_merged(model, adapter_name, "overwritten")
        state_dict = {name: from_storage(name, tensor) for name, tensor in state_dict.items()}
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config) if config.bias != "none" else {}
        state_dict, foreign = split_off_foreign(model, config, adapter_name, state_dict, biases)
        problems = [f"{for_terminal(name)}: no part of the adapter" for name in foreign]
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, parameter in model.named_parameters():
            is_factor = f".{cls.prefix}" in name and name.endswith(f".{adapter_name}")
            if not is_factor and f".modules_to_save.{adapter_name}." not in name:
                continue
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps the whole shape there
            if name not in remapped:
                problems.append(f"{name}: missing in the file, {shape} in the model")
            elif tuple(remapped[name].shape) != shape and not is_factor and mismatched_heads_are_ignored():
                continue  # PEFT leaves it out, with a warning
            elif tuple(remapped[name].shape) != shape:
                problems.append(f"{name}: {tuple(remapped[name].shape)} in the file, {shape} in the model")
            elif is_factor and not remapped[name].is_floating_point():
                problems.append(f"{name}: {remapped[name].dtype} in the file, not floats")
            elif not is_finite(remapped[name]):
                problems.append(f"{name}: holds NaN or infinity")
        if problems:
            raise ValueError(
                f"The saved numbers do not fit adapter {adapter_name!r} (rank={config.rank}, "
                f"decomposition={config.decomposition!r}):\n  " + "\n  ".join(problems) + "\n"
                "Load them into an adapter made with the config they were saved with, on a model with as many labels "
                "(num_labels)."
            )
        # Numbers in a mapped file lie at any address, and products round by the alignment of what they multiply. In
        # memory of their own they give the same bits as those that were saved.
        return {name: value.clone() for name, value in remapped.items()}


def check_not_merged(model: nn.Module, adapter_name: str, doing: str) -> None:
    """Refuse to change an adapter whose increment is part of the base weights: unmerging would subtract another one.

    Raises:
        ValueError: If the adapter is merged.
    """
    if any(isinstance(layer, FacTLinear) and adapter_name in layer.merged_adapters for layer in model.modules()):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights and cannot be {doing}; call unmerge_adapter() "
            "first."
        )
