"""Any sequence of verbs, and after each of them the output that the plain matrices of `reference.py` give.

`Verbs` is a state machine for hypothesis: each rule calls one verb on the model, does in the reference what the verb
says, and says by itself when the verb has to be refused. What is refused must leave the model to the bit as it was.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from fact_peft import FacTConfig, FacTLinear, hotswap_adapter
from tests.backbones import images, logits, make_backbone
from tests.fuzzing.reference import Adapter, Reference, slice_shape

PIXELS = images(count=2)
LABELS = torch.tensor([0, 3])
LEARNING_RATE = 0.1
HEADS = {"vit": "classifier", "swin": "classifier", "timm": "head"}
# Suffixes of the layers to adapt; None: the default, all of them.
TARGETS: dict[str, list[list[str] | None]] = {
    "vit": [None, ["q_proj", "v_proj"], ["k_proj", "v_proj"], ["mlp.fc1"], ["0.mlp.fc2", "1.attention.o_proj"]],
    "swin": [None, ["q_proj", "v_proj"], ["k_proj", "v_proj"], ["fc1"], ["0.mlp.fc2", "1.attention.o_proj"]],
    "timm": [None, ["qkv"], ["attn.proj"], ["fc1"], ["0.mlp.fc2", "1.attn.proj"]],
}
PLAIN = {name: make_backbone(name) for name in HEADS}
EXACT = {name: copy.deepcopy(network).double() for name, network in PLAIN.items()}
LAYERS = {
    backbone: {
        name: (module.in_features, module.out_features)
        for name, module in PLAIN[backbone].named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("vit.layers.", "swin.encoder.layers.", "blocks."))
        if "downsample" not in name
    }
    for backbone in HEADS
}
# The network is float32, the reference float64; weights of this size pass a few hundred roundings on to the output.
TOLERANCE = 3e-5
# Where there is a file system in memory, nothing waits for a disk.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ZERO_AT_FIRST = {"tt": "Sigma", "tk": "P"}  # in an untrained adapter, by decomposition

backbones = st.sampled_from(["vit", "vit", "timm", "timm", "swin"])  # a step on Swin takes twice as long
names = st.sampled_from(["a", "b", "c"])
slots = st.sampled_from(["one", "two"])
seeds = st.integers(0, 999)
scales = st.sampled_from([0.5, 1.0, -0.75, 2.0])
# As a user draws them: how an adapter is made.
settings_of_adapters = st.fixed_dictionaries(
    {
        "rank": st.sampled_from([1, 2, 4, 7]),
        "decomposition": st.sampled_from(["tt", "tk"]),
        "scale": scales,
        "targets": st.integers(0, 4),
        "head": st.booleans(),
    }
)
COUNTS: Counter[str] = Counter()


def plain_name(name: str) -> str:
    """The name of a weight in the network before it was adapted."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def parameters_of(adapter_name: str, named: dict[str, nn.Parameter]) -> dict[tuple[str, str] | str, nn.Parameter]:
    """Those of an adapter among the named parameters of a model, by the keys of the reference."""
    found: dict[tuple[str, str] | str, nn.Parameter] = {}
    for name, parameter in named.items():
        if ".fact_" in name and name.endswith(f".{adapter_name}"):
            _, stack, letter, _ = name.split(".")
            found[stack, letter.removeprefix("fact_")] = parameter
        elif f".modules_to_save.{adapter_name}." in name:
            found[name.replace(f".modules_to_save.{adapter_name}", "")] = parameter
    return found


class Verbs(RuleBasedStateMachine):
    """The verbs that `PeftModel` and transformers' own methods have in common; `model` is made by the subclass."""

    surface = "none"
    prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fact_peft-fuzz-", dir=MEMORY))
        self.saved: dict[str, Adapter] = {}
        self.touched: set[str] = set()
        COUNTS["sequences"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def begin(self, backbone: str) -> None:
        self.backbone = backbone
        self.reference = Reference(EXACT[backbone])
        self.model: Any = copy.deepcopy(PLAIN[backbone])

    # What the rules are written with.

    @property
    def network(self) -> nn.Module:
        """The adapted network itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def config(self, settings: dict[str, Any], adapter: Adapter) -> FacTConfig:
        targets = TARGETS[self.backbone][settings["targets"]]
        return FacTConfig(
            rank=adapter.rank,
            decomposition=adapter.decomposition,
            scale=adapter.scale,
            target_modules=targets,
            modules_to_save=None if settings["head"] else [],
        )

    def expected_adapter(self, settings: dict[str, Any]) -> Adapter:
        targets = TARGETS[self.backbone][settings["targets"]]
        layers = {
            name: shape
            for name, shape in LAYERS[self.backbone].items()
            if targets is None or name.endswith(tuple(f".{target}" for target in targets))
        }
        return Adapter(settings["rank"], settings["decomposition"], settings["scale"], layers)

    def call(self, verb: str, refused: bool, function: Callable[[], Any]) -> Any:
        """Call a verb, which has to be refused or not; return what it returns, or None if it was refused."""
        COUNTS[f"{self.surface} {verb}" + (", to be refused" if refused else "")] += 1
        before = self.snapshot() if refused else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = function()
            except (ValueError, KeyError):  # the second from PEFT, where a file lacks the head
                if not refused:
                    raise
            else:
                assert not refused, f"{verb} should have been refused"
                return result
        after = self.snapshot()
        assert before is not None and before.keys() == after.keys()
        for key, value in before.items():
            same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
            assert same, f"{verb} was refused but changed {key}: {value} became {after[key]}"
        return None

    def snapshot(self) -> dict[str, Any]:
        """Everything a refused verb must leave as it is."""
        network = self.network
        state: dict[str, Any] = {name: value.clone() for name, value in network.state_dict().items()}
        state["grad"] = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        state["modules"] = [(name, type(module)) for name, module in network.named_modules()]
        state["configs"] = {name: copy.deepcopy(vars(config)) for name, config in self.configs().items()}
        for name, module in network.named_modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                state[f"state of {name}"] = (
                    list(module.active_adapters),
                    list(module.merged_adapters),
                    module.disable_adapters,
                    module._get_available_adapters(),
                )
        state["active"] = self.active()
        return state

    def configs(self) -> dict[str, FacTConfig]:
        return getattr(self.model, "peft_config", {})

    def active(self) -> list[str]:
        raise NotImplementedError

    def parameters(self, adapter_name: str) -> dict[tuple[str, str] | str, nn.Parameter]:
        """The parameters of an adapter in the model, by the keys of the reference."""
        return parameters_of(adapter_name, dict(self.network.named_parameters()))

    @torch.no_grad()
    def adopt(self, adapter_name: str) -> None:
        """Let the reference go on with the numbers of the model, rounded to float32 as they are."""
        adapter = self.reference.adapters[adapter_name]
        for key, parameter in self.parameters(adapter_name).items():
            value = parameter.detach().double().clone()
            if isinstance(key, tuple):
                adapter.factors[key] = value
            else:
                adapter.head[key] = value

    @torch.no_grad()
    def begin_adapter(self, adapter_name: str, settings: dict[str, Any], adapter: Adapter, seed: int) -> None:
        """Check a new adapter, which changes nothing yet, and give it numbers."""
        parameters = self.parameters(adapter_name)
        shapes = {key: tuple(value.shape) for key, value in parameters.items() if isinstance(key, tuple)}
        assert shapes == adapter.shapes(), (shapes, adapter.shapes())
        head = {name for name in self.reference.base if name.startswith(f"{HEADS[self.backbone]}.")}
        assert {key for key in parameters if isinstance(key, str)} == (head if settings["head"] else set())
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in sorted(parameters.items(), key=lambda item: str(item[0])):
            if isinstance(key, str):
                assert torch.equal(parameter.double(), self.reference.base[key]), f"{key} is not the network's own"
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                assert key[1] != ZERO_AT_FIRST[adapter.decomposition] or not parameter.any(), f"{key} is not zero"
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.reference.adapters[adapter_name] = adapter
        self.adopt(adapter_name)

    def is_merged(self, adapter_name: str) -> bool:
        return adapter_name in self.reference.merged

    # What holds after every verb.

    @invariant()
    def model_computes_what_the_matrices_say(self) -> None:
        expected = self.reference.logits(PIXELS)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.close(actual := logits(self.model.eval(), PIXELS), expected, "output")
            except AssertionError:  # of numbers so large that float32 also rounds plain matrices by more
                if self.touched:  # merging has rounded the weights
                    raise
                size = max(1.0, expected.abs().max().item())
                assert (actual - expected).abs().max() <= 10 * TOLERANCE * size, "output, by more than float32 rounds"
                COUNTS["outputs compared in float64"] += 1
                error = logits(copy.deepcopy(self.model).double(), PIXELS.double()) - expected
                assert error.abs().max() <= 1e-9 * size, "output in float64"

    @invariant()
    def model_consists_of_what_the_reference_consists_of(self) -> None:
        reference, network = self.reference, self.network
        assert self.configs().keys() == reference.adapters.keys()
        for name, config in self.configs().items():
            adapter = reference.adapters[name]
            assert (config.rank, config.decomposition, config.scale) == (
                adapter.rank,
                adapter.decomposition,
                adapter.scale,
            )
        if reference.adapters:
            assert self.active() == reference.active, (self.active(), reference.active)
        own, named = set(), dict(network.named_parameters())
        for name, adapter in reference.adapters.items():
            parameters = parameters_of(name, named)
            assert parameters.keys() == adapter.numbers.keys()
            own.update(id(parameter) for parameter in parameters.values())
            for key, parameter in parameters.items():
                assert torch.equal(parameter.double(), adapter.numbers[key]), f"{name}: {key} is another"
        rest = {plain_name(name): p for name, p in named.items() if id(p) not in own}
        assert rest.keys() <= reference.base.keys(), rest.keys() - reference.base.keys()
        assert not any(parameter.requires_grad for parameter in rest.values()), "the network itself is trained"
        merged: dict[str, Tensor] = {}
        for increments in reference.merged.values():
            for layer, increment in increments.items():
                self.touched.add(f"{layer}.weight")
                merged[f"{layer}.weight"] = merged.get(f"{layer}.weight", 0) + increment.T
        for name, parameter in rest.items():
            expected = reference.base[name] + merged.get(name, 0)
            if name in self.touched:
                self.close(parameter, expected, name)
            else:
                assert torch.equal(parameter.double(), expected), f"{name} has changed"
        for name, module in network.named_modules():
            if isinstance(module, FacTLinear):
                owners = {owner for owner, adapter in reference.adapters.items() if name in adapter.layers}
                assert set(module.fact_slices) == set(module.fact_stacks) == owners
                assert module.merged_adapters == [other for other in reference.merged if other in owners]
                assert module.disable_adapters == reference.disabled, name

    def close(self, actual: Tensor, expected: Tensor, what: str, *summands: Tensor) -> None:
        """Equal up to the rounding of numbers as large as `expected` and the `summands` it came from."""
        assert torch.isfinite(expected).all(), "the reference itself is not finite"
        error = (actual.detach().double() - expected).abs().max().item()
        bound = TOLERANCE * max(1.0, *(value.abs().max().item() for value in (expected, *summands)))
        assert error <= bound, f"{what} is off by {error:.3g}"

    # The verbs.

    @precondition(lambda self: not self.reference.disabled and self.reference.adapters)
    @rule()
    def train_step(self) -> None:
        reference = self.reference
        trained = {
            (name, key): parameter
            for name in reference.adapters
            for key, parameter in self.parameters(name).items()
            if parameter.requires_grad
        }
        gradients = reference.gradients(PIXELS, LABELS)
        if not trained.keys() & gradients.keys():
            return
        self.model.zero_grad()

        def step() -> None:
            nn.functional.cross_entropy(logits(self.model.train(), PIXELS), LABELS).backward()
            torch.optim.SGD(trained.values(), lr=LEARNING_RATE).step()

        self.call("train step", False, step)
        for (name, key), parameter in trained.items():
            before, gradient = reference.adapters[name].numbers[key], gradients.get((name, key), torch.zeros(()))
            try:
                self.close(parameter, before - LEARNING_RATE * gradient, f"trained {name} {key}", gradient)
            except AssertionError:  # a gradient that float32 cannot hold, of plain matrices neither
                self.gradients_are_right_in_float64(gradients)
                break
        for name in {name for name, _ in trained}:
            self.adopt(name)

    def gradients_are_right_in_float64(self, gradients: dict[Any, Tensor]) -> None:
        """Compare the gradients of a copy that has the numbers the reference still has."""
        COUNTS["gradients compared in float64"] += 1
        model = copy.deepcopy(self.model).double()
        model.zero_grad()
        named = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_parameters())
        with torch.no_grad():
            for name, adapter in self.reference.adapters.items():
                for key, parameter in parameters_of(name, named).items():
                    parameter.copy_(adapter.numbers[key])
        nn.functional.cross_entropy(logits(model.train(), PIXELS.double()), LABELS).backward()
        bound = 1e-9 * max(1.0, *(gradient.abs().max().item() for gradient in gradients.values()))
        for (name, key), gradient in gradients.items():
            actual = parameters_of(name, named)[key].grad
            assert actual is None or (actual - gradient).abs().max() <= bound, f"gradient of {name} {key} in float64"

    @rule(noise=seeds)
    def copy_and_go_on_with_the_copy(self, noise: int) -> None:
        old = self.model
        self.model = self.call("deepcopy", False, lambda: copy.deepcopy(old))
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.fill_(torch.nan)

    def read_back(self, slot: str, adapter_name: str) -> None:
        """Compare the file just saved with the reference."""
        adapter = self.reference.copy(adapter_name)
        (file,) = (self.folder / slot).rglob("adapter_model.safetensors")
        on_disk = {}
        for key, value in load_file(file).items():
            key = key.removeprefix("base_model.model.")
            if key.startswith("factors."):
                _, stack, letter = key.split(".")
                on_disk[stack, letter.removeprefix("fact_")] = value
            else:
                on_disk[key] = value
        assert on_disk.keys() == adapter.numbers.keys()
        for key, value in on_disk.items():
            assert torch.equal(value.double(), adapter.numbers[key]), f"saved {key}"
        for found in list(file.parent.iterdir()):
            target = self.folder / slot / found.name
            if found != target:
                shutil.move(found, target)
        self.saved[slot] = adapter

    @precondition(lambda self: self.saved)
    @rule(slot=slots, adapter_name=names)
    def hotswap(self, slot: str, adapter_name: str) -> None:
        if slot not in self.saved:
            return
        saved, loaded = self.saved[slot], self.reference.adapters.get(adapter_name)
        refused = (
            loaded is None
            or self.is_merged(adapter_name)
            or saved.shapes() != loaded.shapes()
            or saved.decomposition != loaded.decomposition
            or saved.layers != loaded.layers
            or saved.head.keys() != loaded.head.keys()
        )
        self.call("hotswap", refused, lambda: hotswap_adapter(self.model, self.folder / slot, adapter_name))
        if not refused:
            assert loaded is not None
            ratio = saved.scale / loaded.scale
            for key, parameter in self.parameters(adapter_name).items():
                factor = ratio if isinstance(key, tuple) and key[1] == "V" else 1.0
                self.close(parameter, factor * saved.numbers[key], f"swapped {key}")
            self.adopt(adapter_name)


class PeftVerbs(Verbs):
    """A `PeftModel`."""

    surface = "PeftModel"

    @initialize(backbone=backbones, adapter_name=names, settings=settings_of_adapters, seed=seeds)
    def get_peft_model(self, backbone: str, adapter_name: str, settings: dict[str, Any], seed: int) -> None:
        self.begin(backbone)
        self.again(adapter_name, settings, seed)

    def active(self) -> list[str]:
        return list(self.model.active_adapters)

    @rule(adapter_name=names, settings=settings_of_adapters, seed=seeds)
    def again(self, adapter_name: str, settings: dict[str, Any], seed: int) -> None:
        """``get_peft_model`` on the network, adapted or not: the name means this config from now on."""
        adapter = self.expected_adapter(settings)
        refused = self.is_merged(adapter_name)
        network = self.network if isinstance(self.model, PeftModel) else self.model
        config = self.config(settings, adapter)
        model = self.call("get_peft_model", refused, lambda: get_peft_model(network, config, adapter_name))
        if not refused:
            self.model = model
            self.reference.merged.clear()  # PEFT unmerges whenever it switches
            self.begin_adapter(adapter_name, settings, adapter, seed)
            self.reference.activate([adapter_name])

    @rule(adapter_name=names, settings=settings_of_adapters, seed=seeds)
    def add(self, adapter_name: str, settings: dict[str, Any], seed: int) -> None:
        adapter = self.expected_adapter(settings)
        refused = adapter_name in self.reference.adapters
        config = self.config(settings, adapter)
        self.call("add_adapter", refused, lambda: self.model.add_adapter(adapter_name, config))
        if not refused:
            self.reference.merged.clear()
            self.begin_adapter(adapter_name, settings, adapter, seed)

    @rule(adapter_name=names)
    def set_adapter(self, adapter_name: str) -> None:
        refused = adapter_name not in self.reference.adapters
        self.call("set_adapter", refused, lambda: self.model.set_adapter(adapter_name))
        if not refused:
            self.reference.merged.clear()
            self.reference.activate([adapter_name])
            assert all(parameter.requires_grad for parameter in self.parameters(adapter_name).values())

    @precondition(lambda self: len(self.reference.adapters) > 1)
    @rule(data=st.data())
    def set_several(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.reference.adapters)), min_size=2, unique=True))
        refused = sum(bool(self.reference.adapters[name].head) for name in chosen) > 1
        self.call("set several", refused, lambda: self.model.base_model.set_adapter(chosen))
        if not refused:
            self.reference.merged.clear()
            self.reference.activate(chosen)

    @precondition(lambda self: self.reference.adapters)
    @rule()
    def disable(self) -> None:
        expected = self.reference.logits_of(None, PIXELS)

        def run() -> Tensor:
            with self.model.disable_adapter(), torch.no_grad():
                return logits(self.model.eval(), PIXELS)

        self.close(self.call("disable_adapter", False, run), expected, "output while disabled")
        self.reference.merged.clear()  # the first forward while disabled unmerges

    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        available = [*self.reference.adapters, "nobody"]
        chosen = data.draw(st.none() | st.lists(st.sampled_from(available), unique=True))
        self.call("merge_adapter", False, lambda: self.model.merge_adapter(chosen, safe_merge=safe))
        for name in self.reference.active if chosen is None else chosen:
            if name in self.reference.adapters and not self.is_merged(name):
                self.reference.merged[name] = self.reference.copy(name).increments()

    @rule()
    def unmerge(self) -> None:
        self.call("unmerge_adapter", False, self.model.unmerge_adapter)
        self.reference.merged.clear()

    @rule(adapter_name=names)
    def delete(self, adapter_name: str) -> None:
        reference = self.reference
        others = [name for name in reference.active if name != adapter_name]
        if list(reference.adapters) == [adapter_name] or (
            adapter_name == self.model.active_adapter and len(others) > 1
        ):
            return  # `PeftModel.active_adapter` would go on naming what is gone, whatever the method
        refused = adapter_name not in reference.adapters or self.is_merged(adapter_name)
        self.call("delete_adapter", refused, lambda: self.model.delete_adapter(adapter_name))
        if not refused:
            del reference.adapters[adapter_name]
            if adapter_name in reference.active:
                reference.activate(others or sorted(reference.adapters)[:1])

    @precondition(lambda self: self.reference.adapters)
    @rule(slot=slots, data=st.data())
    def save(self, slot: str, data: st.DataObject) -> None:
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        shutil.rmtree(self.folder / slot, ignore_errors=True)
        self.call(
            "save_pretrained",
            False,
            lambda: self.model.save_pretrained(self.folder / slot, selected_adapters=[adapter_name]),
        )
        self.read_back(slot, adapter_name)

    @precondition(lambda self: self.saved)
    @rule(slot=slots, adapter_name=names, trainable=st.booleans())
    def load(self, slot: str, adapter_name: str, trainable: bool) -> None:
        """``load_adapter``: a new adapter, or, as PEFT has it, other numbers for one of the same shape and scale."""
        if slot not in self.saved:
            return
        saved, loaded = self.saved[slot], self.reference.adapters.get(adapter_name)
        refused = loaded is not None and (
            self.is_merged(adapter_name) or saved.shapes() != loaded.shapes() or saved.head.keys() != loaded.head.keys()
        )
        self.call(
            "load_adapter",
            refused,
            lambda: self.model.load_adapter(self.folder / slot, adapter_name, is_trainable=trainable),
        )
        if refused:
            return
        if loaded is None:
            self.reference.merged.clear()
            self.reference.adapters[adapter_name] = copy.deepcopy(saved)
        else:
            loaded.factors, loaded.head = copy.deepcopy(saved.factors), copy.deepcopy(saved.head)

    @precondition(lambda self: self.saved)
    @rule(slot=slots, adapter_name=names, trainable=st.booleans())
    def from_pretrained(self, slot: str, adapter_name: str, trainable: bool) -> None:
        if slot not in self.saved:
            return
        refused, network, path = self.is_merged(adapter_name), self.network, self.folder / slot
        model = self.call(
            "from_pretrained",
            refused,
            lambda: PeftModel.from_pretrained(network, path, adapter_name, is_trainable=trainable),
        )
        if not refused:
            self.model = model
            self.reference.merged.clear()
            self.reference.adapters[adapter_name] = copy.deepcopy(self.saved[slot])
            self.reference.activate([adapter_name])

    @rule(adapter_name=names, scale=scales | st.sampled_from([0, 0.0, math.inf, math.nan, "1", True]))
    def set_scale(self, adapter_name: str, scale: Any) -> None:
        invalid = not isinstance(scale, float) or scale == 0 or not math.isfinite(scale)
        refused = adapter_name not in self.reference.adapters or self.is_merged(adapter_name) or invalid
        self.call("set_scale", refused, lambda: self.model.set_scale(adapter_name, scale))
        if not refused:
            self.reference.adapters[adapter_name].scale = scale

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), adapter_name=names)
    def add_weighted_adapter(self, data: st.DataObject, adapter_name: str) -> None:
        reference = self.reference
        available = [*reference.adapters, *data.draw(st.sampled_from([[], [], ["nobody"]]))]
        chosen = data.draw(st.lists(st.sampled_from(available), min_size=1, max_size=3, unique=True))
        weights = [data.draw(st.sampled_from([1.0, -0.5, 0.3])) for _ in chosen]
        summands = [reference.adapters[name] for name in chosen if name in reference.adapters]
        layers = {
            name: shape
            for name, shape in LAYERS[self.backbone].items()
            if any(name in summand.layers for summand in summands)
        }
        rank = sum(summand.rank for summand in summands)
        refused = (
            "nobody" in chosen
            or adapter_name in reference.adapters
            or rank > min(side for shape in layers.values() for side in slice_shape(*shape))
        )
        self.call(
            "add_weighted_adapter",
            refused,
            lambda: self.model.add_weighted_adapter(chosen, weights, adapter_name),
        )
        if refused:
            return
        reference.merged.clear()
        reference.adapters[adapter_name] = total = Adapter(rank, "tt", 1.0, layers)
        self.adopt(adapter_name)
        increments = total.increments()
        for layer, increment in increments.items():
            expected = torch.zeros_like(increment)
            for weight, summand in zip(weights, summands, strict=True):
                if layer in summand.layers:
                    expected += weight * summand.increments()[layer]
            self.close(increment, expected, f"sum in {layer}")
        assert bool(total.head) == any(summand.head for summand in summands)
        for key, value in total.head.items():
            expected = reference.base[key].clone()
            for weight, summand in zip(weights, summands, strict=True):
                if summand.head:
                    expected += weight * (summand.head[key] - reference.base[key])
            self.close(value, expected, f"sum in {key}")

    @rule(data=st.data())
    def mixed_batch(self, data: st.DataObject) -> None:
        available = ["__base__", *self.reference.adapters, *data.draw(st.sampled_from([[], [], [], ["nobody"]]))]
        chosen = [data.draw(st.sampled_from(available)) for _ in PIXELS]
        refused = "nobody" in chosen or bool(self.reference.merged)

        def run() -> Tensor:
            self.model.eval()
            with torch.no_grad():
                output = self.model(PIXELS, adapter_names=chosen)
            return output if isinstance(output, Tensor) else output.logits

        rows = self.call("adapter_names", refused, run)
        if not refused:
            for row, name, image in zip(rows, chosen, PIXELS.split(1), strict=True):
                expected = self.reference.logits_of(None if name == "__base__" else name, image)
                self.close(row[None], expected, f"row of {name}")


class InjectedVerbs(Verbs):
    """A model of transformers with its own methods.

    Left out is what goes wrong for every PEFT method: adding while switched off (new layers are on), adapters with and
    without a head on one model, several heads at once, and deleting the active adapter (each layer chooses another).
    """

    surface = "transformers"

    @initialize(
        backbone=backbones.filter(lambda name: name != "timm"),
        adapter_name=names,
        settings=settings_of_adapters,
        seed=seeds,
        heads=st.booleans(),
    )
    def first_adapter(self, backbone: str, adapter_name: str, settings: dict[str, Any], seed: int, heads: bool) -> None:
        self.begin(backbone)
        self.heads = heads
        self.add(adapter_name, settings, seed)

    def active(self) -> list[str]:
        return list(self.model.active_adapters()) if self.reference.adapters else []

    @precondition(lambda self: not self.reference.disabled)
    @rule(adapter_name=names, settings=settings_of_adapters, seed=seeds)
    def add(self, adapter_name: str, settings: dict[str, Any], seed: int) -> None:
        self.inject(adapter_name, settings, seed, adapter_name in self.reference.adapters, "add_adapter")

    @precondition(lambda self: not self.reference.disabled and self.reference.adapters)
    @rule(adapter_name=names, settings=settings_of_adapters, seed=seeds)
    def again(self, adapter_name: str, settings: dict[str, Any], seed: int) -> None:
        self.inject(adapter_name, settings, seed, False, "inject_adapter_in_model")

    def inject(self, adapter_name: str, settings: dict[str, Any], seed: int, refused: bool, verb: str) -> None:
        settings = {**settings, "head": self.heads}
        adapter = self.expected_adapter(settings)
        config = self.config(settings, adapter)
        if verb == "add_adapter":
            self.call(verb, refused, lambda: self.model.add_adapter(config, adapter_name))
        else:
            self.call(verb, refused, lambda: inject_adapter_in_model(config, self.model, adapter_name))
        if not refused:
            self.begin_adapter(adapter_name, settings, adapter, seed)
            self.reference.activate([adapter_name])

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data())
    def set_adapter(self, data: st.DataObject) -> None:
        available = [*self.reference.adapters, "nobody"]
        chosen = data.draw(
            st.lists(st.sampled_from(available), min_size=1, max_size=1 if self.heads else 3, unique=True)
        )
        refused = "nobody" in chosen
        self.call("set_adapter", refused, lambda: self.model.set_adapter(chosen))
        if not refused:
            self.reference.activate(chosen)

    @precondition(lambda self: self.reference.adapters)
    @rule()
    def disable(self) -> None:
        self.call("disable_adapters", False, self.model.disable_adapters)
        self.reference.disabled = self.reference.head_disabled = True

    @precondition(lambda self: self.reference.adapters)
    @rule()
    def enable(self) -> None:
        """transformers switches the layers on again, but not the classifier, whatever the method."""
        self.call("enable_adapters", False, self.model.enable_adapters)
        self.reference.disabled = False

    @precondition(lambda self: self.reference.adapters)
    @rule(adapter_name=names)
    def delete(self, adapter_name: str) -> None:
        reference = self.reference
        if adapter_name in reference.active:
            return
        refused = adapter_name not in reference.adapters
        self.call("delete_adapter", refused, lambda: self.model.delete_adapter(adapter_name))
        if not refused:
            del reference.adapters[adapter_name]

    @precondition(lambda self: len(self.reference.active) == 1)
    @rule(slot=slots)
    def save(self, slot: str) -> None:
        shutil.rmtree(self.folder / slot, ignore_errors=True)
        self.call("save_pretrained", False, lambda: self.model.save_pretrained(self.folder / slot))
        self.read_back(slot, self.reference.active[0])

    @precondition(lambda self: self.saved and not self.reference.disabled)
    @rule(slot=slots, adapter_name=names)
    def load(self, slot: str, adapter_name: str) -> None:
        if slot not in self.saved:
            return
        refused, path = adapter_name in self.reference.adapters, str(self.folder / slot)
        self.call("load_adapter", refused, lambda: self.model.load_adapter(path, adapter_name=adapter_name))
        if not refused:
            self.reference.adapters[adapter_name] = copy.deepcopy(self.saved[slot])
            self.reference.activate([adapter_name])
