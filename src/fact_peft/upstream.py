"""The private names of PEFT, transformers and torch that the tuner uses, and the registration of FacT.

``docs/upstream.md`` lists the names and what they are used for. If a release no longer has one of them, importing
fact_peft raises an error with the name and the version.
"""

import pkgutil
import warnings
from importlib.metadata import version
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "FACT"
USED: dict[str, str] = {}  # what each private name is used for


def private(path: str, used_for: str) -> Any:
    """Return the object at ``"module:name"`` or ``"module:class.attribute"``, and add it to `USED`."""
    full_name = path.replace(":", ".")
    package = full_name.partition(".")[0]
    USED[full_name] = used_for
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fact_peft needs {full_name}, which {package} {version(package)} does not have ({used_for}). "
            f"Install a release of {package} that docs/versions.md lists, or a newer fact_peft."
        ) from error


TUNERS = "peft.tuners.tuners_utils"
# Functions and classes that are called.
ExcludedModule = private(f"{TUNERS}:_ExcludedModule", "to tell a layer that is excluded from one that is not targeted")
find_minimal_target_modules = private(
    f"{TUNERS}:_find_minimal_target_modules", "to write `target_modules` down as name suffixes"
)
include_all_linear_layers = private(f"{TUNERS}:_maybe_include_all_linear_layers", "to resolve 'all-linear'")
activate_heads = private(
    "peft.utils.other:_set_adapter", "to activate the heads of an adapter after another was deleted"
)
split_download_arguments = private(
    "peft:PeftConfig._split_kwargs", "to find the arguments of a Hub download among those of `from_pretrained`"
)
current_graph_task = private("torch._C:_current_graph_task_id", "to tell whether a backward pass runs a layer again")
active_ddp_module = private(
    "torch.nn.parallel:DistributedDataParallel._get_active_ddp_module", "to refuse reentrant checkpointing under DDP"
)
private(f"{TUNERS}:BaseTunerLayer._get_base_layer_device_and_dtype", "to move factors to the device of a layer")
private(f"{TUNERS}:BaseTuner._get_learnable_bias_state_dict", "to save trained biases")
# Methods that are overridden. If PEFT renamed one, it would call its own method and not ours.
private(f"{TUNERS}:BaseTunerLayer._get_available_adapters", "overridden: a layer holds no factors itself")
private(f"{TUNERS}:BaseTunerLayer._move_adapter_to_device_of_base_layer", "overridden: factors lie in the stacks")
private("peft.utils.other:ModulesToSaveWrapper._forward_wrapped", "overridden: to compute trained heads in float32")
for hook, purpose in {
    "_check_target_module_exists": "layers come from the plan",
    "_create_and_replace": "to wrap one layer",
    "_replace_module": "FacT's layers have no parameters to move",
    "_cast_adapter_dtype": "adapters loaded for inference stay frozen",
    "_unload_and_optionally_merge": "to remove the shared factors too",
    "_get_module_names_tied_with_embedding": "detectors have none, where PEFT raises",
    "_remove_adapter_name_from_key": "heads may have a parameter of the adapter's name",
    "_get_adapter_state_dict": "to save in the data types of `storage`",
    "_remap_adapter_state_dict_for_load": "to check what is loaded before anything is copied",
}.items():
    private(f"{TUNERS}:BaseTuner.{hook}", f"overridden: {purpose}")
private("peft:PeftModel._enable_peft_forward_hooks", "overridden in the tuner: one adapter per image, `adapter_names`")


def register(config_cls: type, model_cls: Any) -> None:
    """Make FacT known to PEFT, which dispatches on members of the enum `PeftType` and has no entry point for methods
    of other packages. Registering again, as a reloaded module does, replaces the classes. A method of this name in PEFT
    itself or in another package stays in place, with a warning."""
    if NAME not in PeftType.__members__:
        add_peft_type()
    fact = PeftType(NAME)
    present = PEFT_TYPE_TO_TUNER_MAPPING.get(fact)
    if present is not None and present.__module__.partition(".")[0] != __name__.partition(".")[0]:
        warnings.warn(
            f"{present.__module__} already provides PeftType.{NAME} (peft {version('peft')}); fact_peft leaves it in "
            "place and its FacTConfig will not work in this process. Use that implementation, or a version of peft "
            "without it.",
            stacklevel=2,
        )
        return
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(fact, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def add_peft_type() -> None:
    """Add a member to the enum. It pickles, iterates, compares and prints as the others do."""
    member = str.__new__(PeftType, NAME)
    vars(member).update(_name_=NAME, _value_=NAME, __objclass__=PeftType, _sort_order_=len(PeftType))
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


for attribute in ("_member_names_", "_member_map_", "_value2member_map_"):
    private(f"peft.utils.peft_types:PeftType.{attribute}", "to add the member FACT to the enum")


LOADED = "_hf_peft_config_loaded"
private(
    f"transformers.integrations.peft:PeftAdapterMixin.{LOADED}",
    "to unset it after a first adapter was refused, since transformers sets it before it makes the adapter",
)


def unset_loaded(model: Any) -> None:
    """Have transformers take a model without an adapter as one again."""
    if getattr(model, LOADED, False) and not hasattr(model, "peft_config"):
        setattr(model, LOADED, False)


def accept_in_pipeline() -> None:
    """Have ``pipeline("image-classification")`` take a `PeftModel` without logging that it is not supported."""
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS  # not every user of the package needs pipelines

    supported = SUPPORTED_PEFT_TASKS.setdefault("image-classification", [])
    if "PeftModel" not in supported:
        supported.append("PeftModel")


USED["transformers.pipelines.base.SUPPORTED_PEFT_TASKS"] = "an entry for image classification, or pipelines complain"


def table() -> str:
    """The names in `USED`, as a Markdown table."""
    rows = [f"| `{name}` | {purpose} |" for name, purpose in USED.items()]
    return "\n".join(["| private name | used |", "|---|---|", *rows])
