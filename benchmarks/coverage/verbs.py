"""What becomes of every verb of PEFT and transformers, for LoRA and for FacT, each tried in one process.

    python -m benchmarks.coverage.verbs                            # prints the table
    python -m benchmarks.coverage.verbs --write docs/features.md   # and puts it between the markers of that file

Each verb is a short function that calls it on a tiny random ViT and compares the output with plain weights: the base
weights plus what `get_delta_weight` gives, and the trained head. The outcome is "right", "wrong" if the comparison
fails, or the error that the verb raises.
"""

import argparse
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import fact_peft
from benchmarks.coverage.features import METHODS, adapted, close, disturb, images, scores, vit
from benchmarks.reporting.markdown import write_generated

COMMAND = "python -m benchmarks.coverage.verbs"
COMPARED = ("LoRA", "FacT")
WIDEST = 90  # characters of an error message


def base_of(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def by_hand(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The scores of a plain ViT with the increments of these adapters in its weights, and the head of the first."""
    plain, network = vit(), base_of(model)
    with torch.no_grad():
        for path, layer in network.named_modules():
            if hasattr(layer, "get_delta_weight"):
                for name in names:
                    plain.get_submodule(path).weight += layer.get_delta_weight(name)
        heads = getattr(network.classifier, "modules_to_save", {})
        for name in names[:1]:
            if name in heads:
                plain.classifier.load_state_dict(heads[name].state_dict())
    return scores(plain)


def computes(model: nn.Module, *names: str) -> None:
    """Compare the output of a model with that of the adapters it should have active."""
    expected = by_hand(model, names)
    assert not names or not torch.allclose(expected, scores(vit()), atol=1e-3), "the adapter changes nothing"
    close(scores(model), expected)


def pair(method: str, **settings: object) -> PeftModel:
    """Two adapters, the first of them active."""
    model = adapted(method, **settings)
    model.add_adapter("other", METHODS[method](**settings))
    model.set_adapter("other")
    disturb(model)
    model.set_adapter("default")
    return model


def injected(method: str) -> Any:
    """A model of transformers with an adapter of its own."""
    model = vit()
    model.add_adapter(METHODS[method](modules_to_save=None if method == "LoRA" else []), "default")
    disturb(model)
    return model


def injected_pair(method: str) -> Any:
    model = injected(method)
    model.add_adapter(METHODS[method](modules_to_save=None if method == "LoRA" else []), "other")
    disturb(model)
    return model


def saved(model: Any, folder: str) -> str:
    model.save_pretrained(folder)
    return folder


# PEFT


def adapt(method: str, folder: str) -> None:
    computes(adapted(method), "default")


def adapt_again(method: str, folder: str) -> None:
    model = get_peft_model(adapted(method).get_base_model(), METHODS[method]())
    disturb(model)
    computes(model, "default")


def adapt_a_peft_model(method: str, folder: str) -> None:
    model = get_peft_model(adapted(method), METHODS[method](), "outer")
    saved(model, folder)
    close(scores(PeftModel.from_pretrained(adapted(method), folder, "outer")), scores(model))


def inject(method: str, folder: str) -> None:
    model = inject_adapter_in_model(METHODS[method](), vit())
    disturb(model)
    computes(model, "default")


def switch(method: str, folder: str) -> None:
    model = pair(method)
    for name in ("other", "default"):
        model.set_adapter(name)
        computes(model, name)


def several(method: str, folder: str) -> None:
    model = pair(method, modules_to_save=None if method == "LoRA" else [])
    model.base_model.set_adapter(["default", "other"])
    computes(model, "default", "other")


def several_heads(method: str, folder: str) -> None:
    model = pair(method)
    model.base_model.set_adapter(["default", "other"])
    computes(model, "default", "other")


def disable(method: str, folder: str) -> None:
    model = adapted(method)
    with model.disable_adapter():
        close(scores(model), scores(vit()))
    computes(model, "default")


def delete(method: str, folder: str) -> None:
    model = pair(method)
    model.delete_adapter("default")
    computes(model, "other")
    assert not any("default" in name for name in model.state_dict())


def delete_unknown(method: str, folder: str) -> None:
    adapted(method).delete_adapter("nobody")


def merge(method: str, folder: str) -> None:
    model = adapted(method)
    expected = by_hand(model, ["default"])
    model.merge_adapter()
    close(scores(model), expected)
    model.unmerge_adapter()
    close(scores(model), expected)


def merge_two(method: str, folder: str) -> None:
    model = pair(method, modules_to_save=None if method == "LoRA" else [])
    expected = by_hand(model, ["default", "other"])
    model.merge_adapter(["default", "other"], safe_merge=True)
    close(scores(model), expected)


def delete_merged(method: str, folder: str) -> None:
    model = pair(method)
    model.merge_adapter()
    model.delete_adapter("default")
    computes(model, "other")


def merge_and_unload(method: str, folder: str) -> None:
    model = adapted(method)
    expected = by_hand(model, ["default"])
    close(scores(model.merge_and_unload()), expected)


def unload(method: str, folder: str) -> None:
    model, plain = adapted(method), vit()
    plain.classifier.load_state_dict(model.get_base_model().classifier.modules_to_save["default"].state_dict())
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    close(scores(unloaded), scores(plain))


def reload(method: str, folder: str, **arguments: object) -> None:
    model = adapted(method)
    loaded = PeftModel.from_pretrained(vit(), saved(model, folder), **arguments)
    assert torch.equal(scores(loaded), scores(model))


def reload_in_little_memory(method: str, folder: str) -> None:
    reload(method, folder, low_cpu_mem_usage=True)


def load_beside(method: str, folder: str) -> None:
    other, model = adapted(method, seed=1), adapted(method)
    model.load_adapter(saved(other, folder), "other")
    computes(model, "default")
    model.set_adapter("other")
    close(scores(model), scores(other))


def load_over(method: str, folder: str) -> None:
    other, model = adapted(method, seed=1), adapted(method)
    model.load_adapter(saved(other, folder), "default")
    close(scores(model), scores(other))


def load_over_another_rank(method: str, folder: str) -> None:
    other, model = adapted(method, **({"rank": 2} if method == "FacT" else {"r": 2})), adapted(method)
    model.load_adapter(saved(other, folder), "default")
    close(scores(model), scores(other))


def state_dicts(method: str, folder: str) -> None:
    other, model = adapted(method, seed=1), adapted(method)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
    close(scores(model), scores(other))


def weighted(method: str, folder: str) -> None:
    model = pair(method, modules_to_save=None if method == "LoRA" else [])
    exact = {"combination_type": "cat"} if method == "LoRA" else {}
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", **exact)
    expected = by_hand(model, ["default", "other"])
    model.set_adapter("sum")
    close(scores(model), expected)


def mixed(method: str, folder: str) -> None:
    model, names = pair(method), ["default", "other", "__base__", "default"]
    rows = [by_hand(model, [] if name == "__base__" else [name])[image] for image, name in enumerate(names)]
    with torch.no_grad():
        close(model(pixel_values=images(), adapter_names=names).logits, torch.stack(rows))


def mixed_while_merged(method: str, folder: str) -> None:
    model = pair(method)
    expected = by_hand(model, ["other"])
    model.merge_adapter()
    with torch.no_grad():
        close(model(pixel_values=images(), adapter_names=["other"] * 4).logits, expected)


def hotswap(method: str, folder: str) -> None:
    other, model = adapted(method, seed=1), adapted(method)
    swap = fact_peft.hotswap_adapter if method == "FacT" else hotswap_adapter
    swap(model, saved(other, folder), adapter_name="default")
    close(scores(model), scores(other))


def hotswap_by_peft(method: str, folder: str) -> None:
    other, model = adapted(method, seed=1), adapted(method)
    hotswap_adapter(model, saved(other, folder), adapter_name="default")
    close(scores(model), scores(other))


def requires_grad(method: str, folder: str) -> None:
    model = pair(method)
    model.set_requires_grad("default", requires_grad=False)
    model.set_requires_grad("other")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("other" in name for name in trained)


def status(method: str, folder: str) -> None:
    model = pair(method)
    found = model.get_model_status()
    assert found.enabled is True and found.active_adapters == ["default"]
    assert found.available_adapters == ["default", "other"] and found.merged_adapters == []
    assert found.requires_grad == {"default": True, "other": False}
    assert found.devices == {"default": ["cpu"], "other": ["cpu"]}


def dtype_casting(method: str, folder: str) -> None:
    model = adapted(method)
    with disable_input_dtype_casting(model):
        computes(model, "default")


def rescale(method: str, folder: str) -> None:
    model = adapted(method)
    with rescale_adapter_scale(model, 2.0):
        assert not torch.allclose(scores(model), by_hand(pair(method), ["default"]), atol=1e-3)
    computes(model, "default")


def is_peft_model(method: str, folder: str) -> None:
    assert check_if_peft_model(saved(adapted(method), folder))


def to_lora(method: str, folder: str) -> None:
    model = adapted(method)
    config, state = (fact_peft.convert_to_lora if method == "FacT" else peft.convert_to_lora)(
        model, **({} if method == "FacT" else {"rank": 4})
    )
    lora = get_peft_model(vit(), config)
    peft.set_peft_model_state_dict(lora, state)
    close(scores(lora), scores(model))


def auto(method: str, folder: str) -> None:
    vit().save_pretrained(f"{folder}/base")
    base = AutoModelForImageClassification.from_pretrained(f"{folder}/base")
    model = get_peft_model(base, METHODS[method]())
    disturb(model)
    model.save_pretrained(f"{folder}/adapter")
    loaded = AutoModelForImageClassification.from_pretrained(f"{folder}/adapter", num_labels=5)
    close(scores(loaded), scores(model))


def deep_copy(method: str, folder: str) -> None:
    model = adapted(method)
    copied = copy.deepcopy(model)
    disturb(model)
    assert not torch.allclose(scores(copied), scores(model))
    computes(copied, "default")


def pickle(method: str, folder: str) -> None:
    model, file = adapted(method), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(scores(torch.load(file, weights_only=False)), scores(model))


# transformers


def add(method: str, folder: str) -> None:
    computes(injected(method), "default")


def add_twice(method: str, folder: str) -> None:
    model = injected(method)
    model.add_adapter(METHODS[method](), "default")


def set_one(method: str, folder: str) -> None:
    model = injected_pair(method)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        computes(model, name)


def set_list(method: str, folder: str) -> None:
    model = injected_pair(method)
    model.set_adapter(["default", "other"])
    computes(model, "default", "other")


def set_unknown(method: str, folder: str) -> None:
    injected(method).set_adapter("nobody")


def switch_off(method: str, folder: str) -> None:
    model = injected(method)
    model.disable_adapters()
    close(scores(model), scores(vit()))
    model.enable_adapters()
    computes(model, "default")


def delete_own(method: str, folder: str) -> None:
    model = injected_pair(method)
    model.set_adapter("default")
    model.delete_adapter("other")
    computes(model, "default")


def load_own(method: str, folder: str) -> None:
    model, loaded = injected(method), vit()
    loaded.load_adapter(saved(model, folder))
    assert torch.equal(scores(loaded), scores(model))


def load_own_over(method: str, folder: str) -> None:
    model = injected(method)
    model.load_adapter(saved(model, folder), "default")


def load_own_from_memory(method: str, folder: str) -> None:
    model, loaded = injected(method), vit()
    config = copy.deepcopy(model.peft_config["default"])
    loaded.load_adapter(peft_config=config, adapter_state_dict=model.get_adapter_state_dict())
    close(scores(loaded), scores(model))


def swap_own(method: str, folder: str) -> None:
    model, other = injected(method), injected(method)
    disturb(other)
    model.load_adapter(saved(other, folder), "default", hotswap=True)
    close(scores(model), scores(other))


def save_own(method: str, folder: str) -> None:
    model = injected(method)
    loaded = PeftModel.from_pretrained(vit(), saved(model, folder))
    assert torch.equal(scores(loaded), scores(model))


Verb = Callable[[str, str], None]
VERBS: dict[str, dict[str, Verb]] = {
    "PEFT": {
        "get_peft_model": adapt,
        "get_peft_model on the same network again": adapt_again,
        "get_peft_model on a PeftModel": adapt_a_peft_model,
        "inject_adapter_in_model": inject,
        "add_adapter, set_adapter": switch,
        "set_adapter of two at once": several,
        "set_adapter of two with a head each": several_heads,
        "disable_adapter": disable,
        "delete_adapter": delete,
        "delete_adapter of an unknown name": delete_unknown,
        "delete_adapter while it is merged": delete_merged,
        "merge_adapter, unmerge_adapter": merge,
        "merge_adapter of two, safe_merge": merge_two,
        "merge_and_unload": merge_and_unload,
        "unload, which leaves the trained head": unload,
        "save_pretrained, from_pretrained": reload,
        "from_pretrained, low_cpu_mem_usage": reload_in_little_memory,
        "load_adapter": load_beside,
        "load_adapter over one of the same shape": load_over,
        "load_adapter over one of another rank": load_over_another_rank,
        "get_ and set_peft_model_state_dict": state_dicts,
        "add_weighted_adapter": weighted,
        "adapter_names": mixed,
        "adapter_names while merged": mixed_while_merged,
        "hotswap_adapter, the method's own": hotswap,
        "peft.utils.hotswap.hotswap_adapter": hotswap_by_peft,
        "set_requires_grad": requires_grad,
        "get_model_status": status,
        "disable_input_dtype_casting": dtype_casting,
        "rescale_adapter_scale": rescale,
        "check_if_peft_model": is_peft_model,
        "convert_to_lora, the method's own": to_lora,
        "copy.deepcopy": deep_copy,
        "torch.save of the model": pickle,
    },
    "transformers": {
        "add_adapter": add,
        "add_adapter of a name that is taken": add_twice,
        "set_adapter, active_adapters": set_one,
        "set_adapter of two at once": set_list,
        "set_adapter of an unknown name": set_unknown,
        "disable_adapters, enable_adapters": switch_off,
        "delete_adapter": delete_own,
        "save_pretrained": save_own,
        "load_adapter": load_own,
        "load_adapter of a name that is taken": load_own_over,
        "load_adapter, get_adapter_state_dict": load_own_from_memory,
        "load_adapter, hotswap": swap_own,
        "from_pretrained of an adapter": auto,
    },
}


def outcome(verb: Verb, method: str) -> str:
    """``"right"``, ``"wrong"`` or ``"refused"`` with the error."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            verb(method, folder)
        except AssertionError as error:
            return f"wrong: {short(error)}"
        except Exception as error:
            return f"refused, {type(error).__name__}: {short(error)}"
    return "right"


def short(error: Exception) -> str:
    """The first line of a message, without what would break a table."""
    line = (str(error).strip().splitlines() or [""])[0].replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= WIDEST else f"{line[:WIDEST].rsplit(' ', 1)[0]} ..."


def table() -> str:
    """The Markdown table of all verbs, and how many have which outcome."""
    lines = [f"| | {' | '.join(COMPARED)} |", f"|{'---|' * (len(COMPARED) + 1)}"]
    counts: dict[str, dict[str, int]] = {method: {} for method in COMPARED}
    for package, verbs in VERBS.items():
        for name, verb in verbs.items():
            outcomes = [outcome(verb, method) for method in COMPARED]
            for method, found in zip(COMPARED, outcomes, strict=True):
                kind = found.replace(":", ",").partition(",")[0]
                counts[method][kind] = counts[method].get(kind, 0) + 1
            lines.append(f"| {package}: {name} | {' | '.join(outcomes)} |")
    summary = "; ".join(
        f"{method}: {', '.join(f'{number} {kind}' for kind, number in found.items())}"
        for method, found in counts.items()
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return "\n".join([*lines, "", f"{summary}.", "", f"Versions: {versions}, fact_peft {fact_peft.__version__}; CPU."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file to put the table in, between its markers")
    arguments = parser.parse_args()
    result = table()
    print(result)
    if arguments.write:
        write_generated(arguments.write, COMMAND, result)


if __name__ == "__main__":
    main()
