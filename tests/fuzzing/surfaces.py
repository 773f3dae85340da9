"""What is done to an adapted model beside the verbs of PEFT, compared with the same plain matrices.

Copies, averages, other data types, adapters as values, exports, checkpointed activations, a second model on one base,
a pool in threads.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fact_peft
from fact_peft import AdapterPool, FacTConfig, weighted_sum
from tests.backbones import logits
from tests.fuzzing.reference import Adapter, _Logits, slice_shape
from tests.fuzzing.verbs import (
    LABELS,
    LAYERS,
    PIXELS,
    PLAIN,
    InjectedVerbs,
    PeftVerbs,
    Verbs,
    names,
    plain_name,
    scales,
    seeds,
    slots,
)

FOR_POOLS = copy.deepcopy(PLAIN)  # a pool changes nothing of its network
decays = st.sampled_from([0.0, 0.5, 0.9])
shares = st.sampled_from([(0.5, 0.5), (0.25, 0.75)])
# For what is slow. The number lies inside, since hypothesis draws the ends more often.
rarely = st.integers(0, 99).map(lambda number: number == 37)


class Surfaces(Verbs):
    """Rules for any of the two surfaces."""

    @torch.no_grad()
    def disturb(self, adapter_name: str, seed: int) -> None:
        """Move the numbers of an adapter in the model and in the reference, as training would."""
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(self.parameters(adapter_name).items(), key=lambda item: str(item[0])):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.adopt(adapter_name)

    def with_the_same_base(self, network: nn.Module) -> nn.Module:
        """A network without adapters, given the weights that this one has without them."""
        network.load_state_dict({name: value.float() for name, value in self.reference.base.items()})
        return network

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), decay=decays, seed=seeds)
    def go_on_with_the_moving_average(self, data: st.DataObject, decay: float, seed: int) -> None:
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        average = self.call(
            "moving average", False, lambda: AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        )
        average.update_parameters(self.model)  # the first is copied
        before = self.reference.copy(adapter_name)
        self.disturb(adapter_name, seed)
        average.update_parameters(self.model)
        after = self.reference.copy(adapter_name)
        old, self.model = self.model, average.module
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.fill_(torch.nan)
        for key, parameter in self.parameters(adapter_name).items():
            expected = decay * before.numbers[key] + (1 - decay) * after.numbers[key]
            self.close(parameter, expected, f"average of {key}")
        self.adopt(adapter_name)

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
    def change_dtype_and_back(self, dtype: torch.dtype) -> None:
        """The model computes as well as plain matrices of that dtype do, and comes back with its numbers rounded."""
        reference = self.reference
        expected = reference.logits(PIXELS)
        state = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.call(f"to {dtype}", False, lambda: self.model.to(dtype))
        assert {value.dtype for value in self.model.parameters()} == {dtype}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = logits(self.model.eval(), PIXELS.to(dtype))
        assert actual.dtype == dtype
        if dtype == torch.float64:
            self.close(actual, expected, "output in float64")
        elif torch.isfinite(actual).all():
            weights = dict(reference.base)
            for layer, dW in reference.added().items():
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + dW.T
            if reference.head is not None and not reference.head_disabled:
                weights.update(reference.adapters[reference.head].head)
            rounded = {
                f"network.{name}": value.to(dtype) if value.is_floating_point() else value
                for name, value in weights.items()
            }
            plain = functional_call(_Logits(copy.deepcopy(reference.plain).to(dtype)), rounded, (PIXELS.to(dtype),))
            bound = 10 * (plain.double() - expected).abs().max() + 30 * torch.finfo(dtype).eps * expected.abs().max()
            assert (actual.double() - expected).abs().max() <= bound + 1e-3, f"output in {dtype}"
        self.model.float()
        for name, value in self.network.state_dict().items():
            exact = state[name].to(dtype).float() if value.is_floating_point() else state[name]
            assert torch.equal(value, exact), f"{name} is not what {dtype} rounds it to"
        for name in reference.adapters:
            self.adopt(name)
        merged: dict[str, Tensor] = {}
        for increments in reference.merged.values():
            for layer, dW in increments.items():
                merged[f"{layer}.weight"] = merged.get(f"{layer}.weight", 0) + dW.T
        own = {id(p) for name in reference.adapters for p in self.parameters(name).values()}
        for name, parameter in self.network.named_parameters():
            if id(parameter) not in own:
                reference.base[plain_name(name)] = parameter.detach().double() - merged.get(plain_name(name), 0)

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), scale=scales)
    def scale_in_the_config(self, data: st.DataObject, scale: float) -> None:
        """Also while merged: what is in the weights stays there until it is taken out."""
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        self.call("config.scale", False, lambda: setattr(self.configs()[adapter_name], "scale", scale))
        self.reference.adapters[adapter_name].scale = scale

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), slot=slots, device=st.sampled_from([None, "meta"]))
    def write(self, data: st.DataObject, slot: str, device: str | None) -> None:
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        shutil.rmtree(self.folder / slot, ignore_errors=True)

        def write() -> None:
            with torch.device(device) if device else nullcontext():
                fact_peft.Adapter.of(self.model, adapter_name).write(self.folder / slot)

        self.call("Adapter.write", False, write)
        self.read_back(slot, adapter_name)

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), bits=st.sampled_from([4, 8]))
    def packed_under_any_default_device(self, data: st.DataObject, bits: int) -> None:
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))

        def pack() -> fact_peft.Adapter:
            with torch.device("meta"):
                fact_peft.Adapter.of(self.model, adapter_name).replace(storage=f"int{bits}").write(self.folder / "pack")
                return fact_peft.Adapter.read(self.folder / "pack")

        numbers = self.reference.adapters[adapter_name].factors
        for stack, factors in self.call("pack on meta", False, pack).factors.items():
            for letter, factor in factors.items():
                exact = numbers[stack, letter]
                # The scales of least squared error are no worse than those that reach the largest number.
                bound = 1.05 * exact.numel() ** 0.5 * exact.abs().max() / (2**bits - 1)
                assert (factor.double() - exact).norm() <= bound, f"int{bits} of {stack} {letter}"

    @precondition(lambda self: self.saved)
    @rule(slot=slots, adapter_name=names, trainable=st.booleans())
    def attach(self, slot: str, adapter_name: str, trainable: bool) -> None:
        reference = self.reference
        if slot not in self.saved or (self.surface == "transformers" and reference.disabled):
            return
        refused = adapter_name in reference.adapters
        adapter = fact_peft.Adapter.read(self.folder / slot)
        self.call("Adapter.attach", refused, lambda: adapter.attach(self.model, adapter_name, trainable))
        if refused:
            return
        reference.adapters[adapter_name] = copy.deepcopy(self.saved[slot])
        if self.surface == "transformers":
            reference.activate([adapter_name])
        else:
            reference.merged.clear()

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), seed=seeds, weights=shares)
    def average_of_clients(self, data: st.DataObject, seed: int, weights: tuple[float, float]) -> None:
        """Federated averaging by `weighted_sum`, attached to a network of its own."""
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        clients, numbers = [], []
        for _ in weights:
            clients.append(fact_peft.Adapter.of(self.model, adapter_name))
            numbers.append(self.reference.copy(adapter_name))
            self.disturb(adapter_name, seed)
        width = min(side for shape in numbers[0].layers.values() for side in slice_shape(*shape))
        total = self.call("weighted_sum", 2 * numbers[0].rank > width, lambda: weighted_sum(clients, weights))
        if total is None:
            return
        network = self.with_the_same_base(copy.deepcopy(PLAIN[self.backbone]))
        total.attach(network)
        added: dict[str, Tensor] = {}
        head: dict[str, Tensor] = {}
        for weight, client in zip(weights, numbers, strict=True):
            for layer, dW in client.increments().items():
                added[layer] = added.get(layer, 0) + weight * dW
            for key, value in client.head.items():
                head[key] = head.get(key, 0) + weight * value
        with torch.no_grad():
            self.close(logits(network.eval(), PIXELS), self.reference.run(PIXELS, added, head), "average of clients")

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), seed=seeds, weights=shares)
    def average_of_state_dicts(self, data: st.DataObject, seed: int, weights: tuple[float, float]) -> None:
        """Numbers averaged by name, as frameworks for federated learning do, and loaded again."""
        adapter_name = data.draw(st.sampled_from(list(self.reference.adapters)))
        states, numbers = [], []
        for _ in weights:
            state = get_peft_model_state_dict(self.model, adapter_name=adapter_name)
            states.append({key: value.clone() for key, value in state.items()})
            numbers.append(self.reference.copy(adapter_name).numbers)
            self.disturb(adapter_name, seed)
        mean = {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]}
        refused = self.is_merged(adapter_name)
        self.call(
            "set_peft_model_state_dict",
            refused,
            lambda: set_peft_model_state_dict(self.model, mean, adapter_name=adapter_name),
        )
        if not refused:
            for key, parameter in self.parameters(adapter_name).items():
                expected = sum(w * client[key] for w, client in zip(weights, numbers, strict=True))
                self.close(parameter, expected, f"mean of {key}")
            self.adopt(adapter_name)

    @precondition(lambda self: self.reference.adapters)
    @rule(data=st.data(), capacity=st.sampled_from([None, 1]))
    def pool_in_threads(self, data: st.DataObject, capacity: int | None) -> None:
        """Two threads call the pool while a third goes on replacing the adapter "moving"."""
        reference = self.reference
        adapters = {name: fact_peft.Adapter.of(self.model, name) for name in reference.adapters}
        loaded = st.sampled_from(list(adapters))
        moving = data.draw(loaded), data.draw(loaded)
        pool = AdapterPool(self.with_the_same_base(FOR_POOLS[self.backbone]), device_capacity=capacity)
        for name, adapter in {**adapters, "moving": adapters[moving[0]]}.items():
            pool.load(name, adapter)
        owners = st.sampled_from([None, "moving", *adapters])
        calls = [[data.draw(owners) for _ in PIXELS] for _ in range(2)]

        def replace() -> None:
            for name in 2 * moving:
                pool.load("moving", adapters[name])

        def run() -> list[list[Any]]:
            with ThreadPoolExecutor(3) as threads:
                futures = [threads.submit(pool, PIXELS, call) for call in calls]
                threads.submit(replace).result()
                return [future.result() for future in futures]

        for call, predictions in zip(calls, self.call("pool in threads", False, run), strict=True):
            for name, prediction, image in zip(call, predictions, PIXELS.split(1), strict=True):
                answers = [reference.logits_of(owner, image)[0] for owner in (moving if name == "moving" else [name])]
                expected = min(answers, key=lambda answer: (answer - prediction.logits.double()).abs().max().item())
                self.close(prediction.logits, expected, f"row of {name} in the pool")

    # transformers asks for gradients of the embeddings, which are a tuple for Swin, whatever the PEFT method.
    @precondition(lambda self: not self.reference.disabled and self.reference.adapters and self.backbone != "swin")
    @rule(reentrant=st.booleans())
    def train_step_with_checkpointing(self, reentrant: bool) -> None:
        network: Any = self.network
        if self.backbone == "timm":
            network.set_grad_checkpointing(True)
        else:
            network.activation_checkpointing_enable({"use_reentrant": reentrant})
        hook = network.get_submodule(EMBEDDINGS[self.backbone]).register_forward_hook(require_gradient)
        self.train_step()
        hook.remove()
        if self.backbone == "timm":
            network.set_grad_checkpointing(False)
        else:
            network.activation_checkpointing_disable()

    @precondition(lambda self: self.backbone != "swin")
    @rule(now=rarely)
    def export(self, now: bool) -> None:
        if not now:
            return
        network = _Logits(self.model).eval()
        program = self.call("torch.export", False, lambda: torch.export.export(network, (PIXELS,), strict=False))
        if self.surface == "PeftModel":  # torch.export leaves a copy here, whatever the PEFT method
            self.network.peft_config = self.model.base_model.peft_config
        with torch.no_grad():
            self.close(program.module()(PIXELS), self.reference.logits(PIXELS), "exported output")


EMBEDDINGS = {"vit": "vit.embeddings", "timm": "patch_embed"}


def require_gradient(module: nn.Module, inputs: Any, output: Any) -> None:
    """Reentrant checkpointing computes no gradients where no input has one."""
    output.requires_grad_(True)


class Tower(nn.Module):
    """Another model around a backbone that is adapted already."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return logits(self.backbone, pixels)


class PeftSurfaces(Surfaces, PeftVerbs):
    """Of a `PeftModel`."""

    @precondition(lambda self: self.reference.adapters)
    @rule(adapter_name=names)
    def second_model_on_the_base(self, adapter_name: str) -> None:
        """It is refused, or computes with an adapter of its own; the first keeps its numbers."""
        first = copy.deepcopy(self.model)
        network = first.get_base_model()
        layers = {name: shape for name, shape in LAYERS[self.backbone].items() if name.endswith("mlp.fc2")}
        config = FacTConfig(rank=2, scale=1.0, target_modules=["mlp.fc2"], modules_to_save=[], init_weights=False)
        own = ".fact_", ".modules_to_save."
        before = {key: value.clone() for key, value in network.state_dict().items() if any(part in key for part in own)}
        tower = Tower(network)

        def adapt() -> Any:
            try:
                return get_peft_model(tower, config, adapter_name)
            except ValueError:
                return None

        second = self.call("second model", False, adapt)
        state = dict(network.named_parameters())  # a state dict warns that it lacks the second model's factors
        for name, value in before.items():
            assert torch.equal(value, state[name]), f"a second model changed {name}"
        if second is None:
            assert not hasattr(tower, "factors")
            with torch.no_grad():
                self.close(logits(first.eval(), PIXELS), self.reference.logits(PIXELS), "first model")
            return
        adapter = Adapter(2, "tt", 1.0, layers)
        for name, parameter in second.named_parameters():
            if name.startswith("base_model.model.factors."):
                _, _, _, stack, letter, owner = name.split(".")
                assert parameter.requires_grad and owner == adapter_name
                adapter.factors[stack, letter.removeprefix("fact_")] = parameter.detach().double()
        assert {key: tuple(value.shape) for key, value in adapter.factors.items()} == adapter.shapes()
        # Layers of the first with an adapter of this name are switched on too, and heads stay: so they do with LoRA.
        if self.reference.head is None and adapter_name not in self.reference.adapters:
            with torch.no_grad():
                expected = self.reference.run(PIXELS, adapter.increments(), {})
                self.close(second.eval()(PIXELS), expected, "second model")

    @precondition(lambda self: self.reference.adapters and not self.reference.merged)
    @rule(data=st.data())
    def gradients_of_a_mixed_batch(self, data: st.DataObject) -> None:
        reference = self.reference
        chosen = [data.draw(st.sampled_from(["__base__", *reference.adapters])) for _ in PIXELS]
        parameters = {(n, key): p for n in reference.adapters for key, p in self.parameters(n).items()}
        flags = {key: p.requires_grad for key, p in parameters.items()}

        def backward() -> list[Tensor | None]:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            output = self.model.eval()(PIXELS, adapter_names=chosen)
            output = output if isinstance(output, Tensor) else output.logits
            loss = nn.functional.cross_entropy(output, LABELS)
            if not loss.requires_grad:
                return [None] * len(parameters)
            return list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))

        gradients = dict(zip(parameters, self.call("gradients of adapter_names", False, backward), strict=True))
        for key, parameter in parameters.items():
            parameter.requires_grad_(flags[key])
        leaves = {}
        for name, adapter in reference.adapters.items():
            for group in (adapter.factors, adapter.head):
                for key in group:
                    group[key] = leaves[name, key] = group[key].clone().requires_grad_()
        rows = [
            reference.logits_of(None if name == "__base__" else name, image)
            for name, image in zip(chosen, PIXELS.split(1), strict=True)
        ]
        loss = nn.functional.cross_entropy(torch.cat(rows), LABELS)
        expected = [None] * len(leaves)
        if loss.requires_grad:
            expected = list(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        for adapter in reference.adapters.values():
            for group in (adapter.factors, adapter.head):
                for key in group:
                    group[key] = group[key].detach()
        for leaf, gradient in zip(leaves, expected, strict=True):
            actual = torch.zeros_like(leaves[leaf]) if gradients[leaf] is None else gradients[leaf]
            wanted = torch.zeros_like(leaves[leaf]) if gradient is None else gradient
            self.close(actual, wanted, f"gradient of {leaf} in a mixed batch")


class InjectedSurfaces(Surfaces, InjectedVerbs):
    """Of a model of transformers."""
