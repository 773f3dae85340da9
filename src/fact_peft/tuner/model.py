"""The tuner, with which PEFT adds, switches, merges, sums and deletes the FacT adapters of one model."""

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from ..adapter.config import FacTConfig, fact_config
from ..adapter.field_checks import check_scale
from ..adapter.names import FACTORS
from ..architecture.linears import close_attentions, open_attentions
from ..method.tensorization import stack_sizes
from ..upstream import ExcludedModule, unset_loaded
from . import lifecycle
from .adapter_names import using_adapters
from .combination import sum_of_model
from .factors import FacTLayer, announce, ordinary_tensors, remove_factors
from .head import FacTHead, adopt_heads, cast_in_place
from .layer import FacTLinear
from .mixed_batch import calling_with, current_batch
from .planning import is_targeted, resolve
from .refusals import check_unwrapped


class FacTModel(BaseTuner):
    """Adapts a model with FacT; made by ``get_peft_model(model, FacTConfig(...))``.

    The targeted linear layers become `FacTLinear`. The factors they share are registered once on the adapted model, as
    ``model.factors``.

    Raises:
        NoMatchingPeftModuleError: If no layer of the model is targeted.
        ValueError: If a target is not a linear layer, the rank exceeds a layer's width, the config belongs to an
            adapter of other layers, or the adapter's name cannot be used. Model and config are then as they were.
    """

    prefix = "fact_"
    tuner_layer_cls = FacTLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_unwrapped(model)
        super().__init__(model, *args, **kwargs)

    @ordinary_tensors()
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Settle the config, then create the factors and wrap the layers; see `BaseTuner`.

        `state_dict` is not used, since the layers follow from the config and its layout.
        """
        asked = self.peft_config[adapter_name]
        assert isinstance(asked, FacTConfig)
        previous, is_saved = lifecycle.own_factors(model).configs.get(adapter_name), asked.layout is not None
        try:
            lifecycle.check_not_merged(model, adapter_name, "replaced")
            config = resolve(asked, model, adapter_name)
            if asked.inference_mode:
                # The caller of `PeftModel.from_pretrained(model, folder, config=config)` keeps the config object.
                vars(asked).update(vars(config))
                config = asked
        except Exception:
            del self.peft_config[adapter_name]
            if previous is not None:  # the model keeps the adapter that it has under this name
                self.peft_config[adapter_name] = previous
            unset_loaded(model)
            raise
        self.peft_config[adapter_name] = config
        lifecycle.forget(self.model, adapter_name)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        targets, in_part = config.target_modules, any(owned.parts for owned in config.slices.values())
        with lifecycle.undone_on_failure(model, adapter_name, self.peft_config) as heads, warnings.catch_warnings():
            if in_part:  # PEFT knows only whole layers, none of which is excluded
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            open_attentions(model, config.slices)
            factors = lifecycle.own_factors(model)
            setattr(model, FACTORS, factors)
            if factors.hook is None:
                factors.hook = model.register_state_dict_pre_hook(announce)
            super().inject_adapter(model, adapter_name, *args, **{**kwargs, "state_dict": None})
            adopt_heads(model, factors.configs, heads)
            factors.keep_statistics(model)
            self._arguments = frozenset(inspect.signature(model.forward).parameters)
        if in_part:  # PEFT shortens long lists of targets by comparing names of modules, which parts are not
            config.target_modules = targets
        for stack in lifecycle.own_stacks(model, adapter_name) if is_saved else []:
            stack.unloaded[adapter_name] = trained
        for head in model.modules() if adapter_name in self.active_adapters else []:
            # PEFT activates a new head only where there was none.
            if isinstance(head, FacTHead) and adapter_name in head.modules_to_save and not head.active_adapters:
                head.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without those arguments that are None and that it does not have.

        ``PeftModelForFeatureExtraction`` passes arguments of text models, such as ``input_ids=None``, to every model.
        """
        given = {key: value for key, value in kwargs.items() if value is not None or key in self._arguments}
        return self.model(*args, **given)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors tie their heads to each other and have no embeddings
            return []

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # `resolve` has found all targets. PEFT also wants to know whether a module is excluded.
        answer = is_targeted(peft_config, key) if peft_config.exclude_modules else False
        return answer if isinstance(answer, ExcludedModule) else key in peft_config.slices

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        slices = peft_config.slices[current_key]
        stack = lifecycle.own_factors(self.model).stack_for(slices)
        if adapter_name not in stack.fact_U:
            stack.add_adapter(adapter_name, peft_config, stack_sizes(peft_config.slices.values())[slices.stack])
        if not isinstance(target, FacTLinear):
            layer = FacTLinear(target, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, slices, stack)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method also moves parameters, which FacT's layers do not have, and fails on heads without a weight.
        setattr(parent, child_name, new_module)

    @ordinary_tensors()
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes new parameters, which all require gradients, also for an adapter that is loaded for inference.
        trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable[name])
        for head in self.model.modules() if autocast_adapter_dtype else []:
            if isinstance(head, FacTHead) and adapter_name in head.modules_to_save:
                cast_in_place(head.modules_to_save[adapter_name], torch.float32)  # half precision cannot be trained

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Change the scale s of an adapter, which is saved with it. This is possible before and after training.

        Raises:
            ValueError: If there is no such adapter, it is merged, or `scale` is not a number, zero or not finite.
        """
        config = fact_config(self, adapter_name)
        check_scale(scale)
        lifecycle.check_not_merged(self.model, adapter_name, "scaled")
        config.scale = float(scale)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the adapter whose increments are the weighted sum of those of others, exactly; see `weighted_sum`.

        Args:
            adapters: Names of the adapters to sum.
            weights: Their weights, in the same order; negative ones subtract.
            adapter_name: Name of the new adapter. It is not activated.

        Raises:
            ValueError: If an adapter is unknown or trains biases, the new name is taken, the lengths differ, a weight
                is not finite, or the ranks add up to more than a layer's width.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose another name or delete it first.")
        summed = sum_of_model(self.model, adapters, weights)
        self.peft_config[adapter_name] = summed.config
        self.inject_adapter(self.model, adapter_name)
        self._cast_adapter_dtype(adapter_name)
        summed.fill(self.model, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and the stacks that no other adapter uses.

        If it was the only active adapter, the alphabetically first of the others becomes active in every layer.

        Raises:
            ValueError: If there is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist.")
        if lifecycle.is_merged(self.model, adapter_name):  # PEFT's own message
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        lifecycle.forget(self.model, adapter_name)
        if adapter_name not in self.active_adapters:
            return
        # PEFT lets each layer choose among its own adapters, so that layers could choose differently.
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.peft_config:
            active = [min(self.peft_config)]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
        lifecycle.activate(self.model, active)
        self.active_adapter = active

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add increments to the base weights; see `BaseTuner.merge_adapter`. A refused merge changes nothing."""
        lifecycle.check_mergeable(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        if merge:
            lifecycle.check_mergeable(self.model, adapter_names, safe_merge)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        remove_factors(self.model)
        close_attentions(self.model)
        return self.model

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        if kwargs.get("adapter_names") is not None:
            return using_adapters(self.model, kwargs["adapter_names"], args, kwargs)
        # In a call inside another call, the adapters of the outer one do not apply.
        return nullcontext() if current_batch() is None else calling_with(None)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of heads and biases do not contain the adapter's name, but may end in it if it is "weight".
        return super()._remove_adapter_name_from_key(key, adapter_name) if f".{cls.prefix}" in key else key

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The factors and biases of an adapter as they are saved."""
        config.check_changeable()
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return lifecycle.stored_state_dict(config, adapter_name, tensors)

    @classmethod
    @ordinary_tensors()
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As `lifecycle.checked_state_dict`. If it raises, an adapter that was created for the tensors is removed."""
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config) if config.bias != "none" else {}
        try:
            return lifecycle.checked_state_dict(
                model, config, adapter_name, state_dict, biases, super()._remap_adapter_state_dict_for_load
            )
        except ValueError:
            lifecycle.undo_awaiting(model, adapter_name)
            raise
