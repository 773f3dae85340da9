"""The start from gradients: against whole gradients of the frozen weights, decomposed by tensorly in float64."""

import copy
import multiprocessing

import numpy as np
import pytest
import torch
from backbones import holdings, images, logits, make_backbone, to_int8, vit
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from fact_peft import FacTConfig, initialize_from_gradients
from fact_peft.method import gradient_sketch
from fact_peft.operations.gradient_start import layers_of

WIDTH = 24
DECOMPOSITIONS = ["tt", "tk", "cp"]


def adapt(model, **settings):
    torch.manual_seed(5)
    return get_peft_model(model, FacTConfig(**{"rank": 4, **settings})).eval()


def encoder():
    """Two layers of torch's transformer, whose attention reads its weights, and a head."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=2 * WIDTH, batch_first=True, dropout=0.0)
    layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    return nn.Sequential(nn.Conv1d(3, WIDTH, 1), Rows(), layers, nn.Linear(WIDTH, 5)).double().eval()


class Rows(nn.Module):
    def forward(self, x):
        return x.mT


def batches(count=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 3, 16, 16, generator=generator).to(dtype), torch.randint(5, (4,), generator=generator))
        for _ in range(count)
    ]


def loss(model, batch):
    pixels, labels = batch
    return nn.functional.cross_entropy(logits(model, pixels).float(), labels).to(pixels.dtype)


def token_loss(model, batch):
    pixels, labels = batch
    return nn.functional.cross_entropy(model(pixels.flatten(2)[..., :9]).mean(1), labels)


def start(model, data=None, **settings):
    data = batches() if data is None else data
    initialize_from_gradients(model, data, **{"loss": loss, "show_progress_bar": False, **settings})


def slice_gradients(model, data, loss=loss):
    """By stack, the gradients (N, d, e) of all slices, each layer's scaled to norm 1: from the frozen weights' own."""
    found = {}
    layers = layers_of(model, "default")
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers]
    gradients = torch.autograd.grad(sum(loss(model, batch) for batch in data), weights)
    for layer, gradient in zip(layers, gradients, strict=True):
        layer.base_layer.weight.requires_grad_(False)
        owned = layer.fact_slices["default"]
        d, e = owned.in_width, owned.out_width
        blocks = [
            gradient.double().T[i * d : (i + 1) * d, j * e : (j + 1) * e]
            for i in range(owned.num_in_blocks)
            for j in owned.out_blocks
        ]
        norm = torch.stack(blocks).norm()
        found.setdefault(layer.fact_stacks["default"], []).extend(block / norm for block in blocks)
    return {stack: torch.stack(blocks).numpy() for stack, blocks in found.items()}


def projector(columns):
    """Onto the span of the columns of a matrix (n, r)."""
    Q = np.linalg.qr(as_array(columns))[0]
    return Q @ Q.T


def as_array(tensor):
    return tensor.detach().double().numpy() if isinstance(tensor, torch.Tensor) else tensor


def assert_is_the_decomposition(model, data, loss=loss, atol=1e-7):
    """The factors span the leading left singular vectors of the unfoldings of the gradients (higher-order SVD)."""
    tensorly = pytest.importorskip("tensorly")
    for stack, gradients in slice_gradients(model, data, loss).items():
        factors = {letter: factor.detach() for letter, factor in stack.factors("default").items()}
        rank = factors["U"].shape[1]
        for mode, letter in ((1, "U"), (2, "V")):
            unfolded = tensorly.unfold(gradients, mode)
            expected = projector(tensorly.tenalg.svd_interface(unfolded, n_eigenvecs=rank)[0])
            np.testing.assert_allclose(projector(factors[letter]), expected, atol=atol)
            gram = factors[letter].T @ factors[letter]
            torch.testing.assert_close(gram, torch.eye(rank, dtype=gram.dtype), rtol=0, atol=1e-6)


@pytest.fixture
def exact(monkeypatch):
    """As many columns as the slices are wide, so that nothing is left out of the sketch."""
    monkeypatch.setattr(gradient_sketch, "OVERSAMPLING", 1000)


# Backbone and settings.
MODELS = {
    "vit": ("vit", {}),
    "Tucker": ("vit", {"decomposition": "tk"}),
    "canonical polyadic": ("vit", {"decomposition": "cp"}),
    "Swin's stacks": ("swin", {"decomposition": "tk"}),
    "a fused layer": ("timm", {}),
    "parts of a fused layer": ("timm", {"target_modules": ["qkv.q", "qkv.v", "fc2"], "decomposition": "tk"}),
    "by block": ("vit", {"share": "block", "decomposition": "tk", "rank": 15}),
    "some layers": ("deit", {"target_modules": ["fc1"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_full_sketch_is_the_exact_decomposition(name, exact):
    backbone, settings = MODELS[name]
    model = adapt(make_backbone(backbone, torch.float64), **settings)
    start(model)
    assert_is_the_decomposition(model, batches())


def with_two_inputs(model, data):
    """The mean loss of two networks, of which the input of the first already requires a gradient."""
    pixels, labels = data
    networks = model.get_base_model()
    first, second = networks[0], networks[1]
    reached = pixels.clone().requires_grad_()
    return loss(first, (reached, labels)) + loss(second, (pixels.flip(-1), labels))


@pytest.mark.parametrize("how", ["enable_input_require_grads", "pixels", "one of two networks"])
def test_inputs_that_require_a_gradient_change_nothing(how, exact):
    if how == "one of two networks":
        model, compute = adapt(nn.ModuleList([make_backbone("vit", torch.float64) for _ in range(2)])), with_two_inputs
    else:
        model, compute = adapt(make_backbone("vit", torch.float64)), loss
    if how == "enable_input_require_grads":  # as gradient checkpointing and k-bit training do
        model.enable_input_require_grads()
    data = [(pixels.requires_grad_(how == "pixels"), labels) for pixels, labels in batches()]
    start(model, data, loss=compute)
    assert_is_the_decomposition(model, data, compute)
    assert all(pixels.grad is None for pixels, _ in data)


def test_a_loss_may_take_labels_out_of_its_batch():
    def popping(model, batch):
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(logits(model, batch["pixel_values"]), labels)

    data = [{"pixel_values": pixels.float(), "labels": labels} for pixels, labels in batches()]
    popped, kept = adapt(make_backbone("vit")), adapt(make_backbone("vit"))
    start(popped, data, loss=popping)
    start(kept, data, loss=None)
    for name, factor in kept.named_parameters():
        assert torch.equal(factor, dict(popped.named_parameters())[name])


def test_inference_mode_outside_changes_nothing():
    expected, inside = adapt(make_backbone("vit", torch.float64)), adapt(make_backbone("vit", torch.float64))
    start(expected)
    data = batches()
    with torch.inference_mode():
        start(inside, data)
    for name, factor in expected.named_parameters():
        assert torch.equal(factor, dict(inside.named_parameters())[name])


def test_weights_that_are_read_give_their_gradients_too(exact):
    model = adapt(encoder())
    assert any("in_proj" in name for name in model.peft_config["default"].target_modules)
    start(model, loss=token_loss)
    assert_is_the_decomposition(model, batches(), token_loss)


def test_rectangular_slices(exact):
    torch.manual_seed(0)
    model = adapt(vit(intermediate_size=48).double().eval(), decomposition="tk")
    assert set(model.base_model.model.factors) == {"32x32", "32x48", "48x32"}
    start(model)
    assert_is_the_decomposition(model, batches())


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_narrow_sketch_holds_what_the_iteration_of_tensorly_does_but_for_a_tenth(decomposition):
    partial_tucker = pytest.importorskip("tensorly.decomposition").partial_tucker
    model = adapt(make_backbone("vit", torch.float64), decomposition=decomposition)
    start(model)
    for stack, gradients in slice_gradients(model, batches()).items():
        (_, (U, V)), _ = partial_tucker(gradients, rank=(4, 4), modes=[1, 2], n_iter_max=50, init="svd")
        factors = stack.factors("default")
        ours = np.linalg.norm(as_array(factors["U"]).T @ gradients @ as_array(factors["V"]))
        best = np.linalg.norm(U.T @ gradients @ V)
        assert 0.9 * best < ours < best * (1 + 1e-9)


class Products(nn.Module):
    """Linear layers in two blocks, whose inputs x and output gradients g a batch says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = [(WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH)]
        self.layers = nn.ModuleList(
            [nn.ModuleDict({f"fc{i}": nn.Linear(*s) for i, s in enumerate(shapes)}) for _ in "ab"]
        )
        self.double()

    def forward(self, x, g):
        linears = [layer for block in self.layers for layer in block.values()]
        return sum((linear(x) * g).sum() for linear, x, g in zip(linears, x, g, strict=True))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gradients_of_exact_rank_are_spanned(decomposition):
    rank, generator = 3, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V, cores = random(WIDTH, rank), random(WIDTH, rank), iter(random(14, rank, rank))
    model = adapt(Products(), rank=rank, decomposition=decomposition, target_modules=["fc0", "fc1", "fc2"])
    x, g = [], []
    for layer in layers_of(model, "default"):  # G = x^T g of slices U Sigma V^T
        owned = layer.fact_slices["default"]
        x.append(torch.block_diag(*[U] * owned.num_in_blocks).T)
        rows = [torch.cat([next(cores) @ V.T for _ in owned.out_blocks], 1) for _ in range(owned.num_in_blocks)]
        g.append(torch.cat(rows))
    data = [(x, [share * part for part in g]) for share in (0.3, 0.7)]  # of one sum over batches
    start(model, data, loss=lambda model, batch: model(*batch))
    (stack,) = {layer.fact_stacks["default"] for layer in layers_of(model, "default")}
    factors = stack.factors("default")
    np.testing.assert_allclose(projector(factors["U"]), projector(U), atol=1e-6)
    np.testing.assert_allclose(projector(factors["V"]), projector(V), atol=1e-6)


@pytest.mark.parametrize("change", ["bfloat16", "int8", "frozen", "disabled", "checkpointing"])
def test_frozen_half_precision_and_quantised_models(change, exact):
    dtype = torch.bfloat16 if change == "bfloat16" else torch.float32
    plain = adapt(make_backbone("vit"), fact_dropout=0.5)
    backbone = make_backbone("vit", dtype)
    if change == "int8":
        to_int8(backbone.vit.layers)
    model = adapt(backbone, fact_dropout=0.5)
    if change == "frozen":
        model.requires_grad_(False)
    elif change == "disabled":
        model.base_model.disable_adapter_layers()
    elif change == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    data = batches(dtype=dtype)
    with torch.no_grad():
        before = logits(model, data[0][0])
    start(model, data)
    with torch.no_grad():
        assert torch.equal(logits(model, data[0][0]), before)
    start(plain, batches(dtype=torch.float32))
    (stack,), (expected,) = ({x.fact_stacks["default"] for x in layers_of(m, "default")} for m in (model, plain))
    tolerance = {"bfloat16": 0.1, "int8": 0.1}.get(change, 1e-5)  # of singular vectors of rounded gradients
    for letter in "UV":
        found, wanted = (s.factors("default")[letter].detach().float() for s in (stack, expected))
        assert np.abs(projector(found) - projector(wanted)).max() < tolerance


# Several processes


def on_rank(rank, folder):
    torch.set_num_threads(1)  # a new process has not read conftest.py
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = adapt(make_backbone("vit", torch.float64))
    data = batches(3)[rank::2]  # two and one
    wrapped = DistributedDataParallel(model)
    start(wrapped, data)
    loss(wrapped, data[0]).backward()  # which still averages gradients
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({**model.state_dict(), **gradients}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_get_the_factors_of_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=on_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(name.endswith("fact_Sigma.default.grad") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = adapt(make_backbone("vit", torch.float64))
    start(model)
    for name, factor in model.state_dict().items():
        if any(f"fact_{letter}." in name for letter in "UV"):
            np.testing.assert_allclose(projector(first[name]), projector(factor), atol=1e-9)


def test_a_sharded_model_is_refused(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapt(make_backbone("vit"))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded over processes .* before the model is sharded"):
            start(model)
    finally:
        distributed.destroy_process_group()


def test_partitioned_parameters_of_zero_are_refused():
    model = adapt(make_backbone("vit"))
    model.get_base_model().vit.layers[0].mlp.fc1.base_layer.weight.ds_shape = (128, 32)
    refused(model, "ZeRO-3")


# What stays


def test_nothing_but_the_shared_factors_changes():
    backbone = make_backbone("timm")
    backbone.norm = nn.Sequential(backbone.norm, Rows(), nn.BatchNorm1d(32), Rows(), nn.Dropout(0.5))
    model = adapt(backbone, decomposition="tk").train()
    model.base_model.model.blocks[0].eval()
    model.base_model.model.patch_embed.proj.bias.grad = kept = torch.ones(32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    held, attributes = holdings(model), [set(vars(module)) for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    loader = DataLoader(TensorDataset(images(count=12), torch.arange(12) % 5), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    start(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert [parameter.grad for parameter in model.parameters() if parameter.grad is not None] == [kept]
    assert model.peft_config["default"].to_dict() == config
    changed = {
        name.split(".")[-2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"fact_U", "fact_V"}
    assert holdings(model) == held and [set(vars(module)) for module in model.modules()] == attributes


def test_a_seed_gives_the_same_factors_whatever_was_drawn_before():
    loader = DataLoader(TensorDataset(images(count=12), torch.arange(12) % 5), batch_size=4, shuffle=True)
    found = []
    for seed, drawn in ((0, 1), (0, 2), (3, 1)):
        model = adapt(make_backbone("vit"))
        torch.manual_seed(drawn)
        start(model, loader, num_batches=2, seed=seed)
        found.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "fact_U" in n]))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_the_loss_of_the_model_is_taken_of_batches_that_are_dicts():
    model, same = (adapt(make_backbone("vit", torch.float64)) for _ in range(2))
    dicts = [{"pixel_values": pixels, "labels": labels} for pixels, labels in batches()]
    start(model, iter(dicts), loss=None)
    start(same, loss=lambda model, batch: model(pixel_values=batch[0], labels=batch[1]).loss)
    for (name, ours), theirs in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_another_adapter_stays_as_it_is():
    model = adapt(make_backbone("vit"))
    model.add_adapter("other", FacTConfig(rank=2))
    before = copy.deepcopy(model.state_dict())
    start(model, batches(dtype=torch.float32), adapter_name="other")
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and all(name.endswith((".fact_U.other", ".fact_V.other")) for name in changed)


# What is refused


def refused(model, match, data=None, **settings):
    """`start` raises and leaves all as it was."""
    before, held = copy.deepcopy(model.state_dict()), holdings(model)
    with pytest.raises(ValueError, match=match):
        start(model, batches(dtype=torch.float32) if data is None else data, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert holdings(model) == held


def with_nan():
    data = batches(dtype=torch.float32)
    data[1][0][0, 0, 0, 0] = torch.nan
    return data


def as_dicts(**more):
    return [{"pixel_values": pixels, **more} for pixels, _ in batches(dtype=torch.float32)]


def root(model, batch):
    """Finite, with an infinite gradient."""
    return (logits(model, batch[0]) * 0).sum().abs().sqrt()


@pytest.mark.parametrize(
    ("match", "data", "settings"),
    [
        ("NaN or infinity in the loss of batch 1", with_nan, {}),
        ("dataloader has no batches", list, {}),
        ("returns no loss for a batch of pixel_values; add labels", as_dicts, {"loss": None}),
        ("of type tuple, which is no dict", None, {"loss": None}),
        ("The loss has no gradient", None, {"loss": lambda model, batch: loss(model, batch).detach()}),
        ("The loss has no gradient", None, {"loss": torch.no_grad()(loss)}),
        ("The loss has no gradient", None, {"loss": lambda model, batch: torch.ones((), requires_grad=True)}),
        ("are zero", None, {"loss": lambda model, batch: 0 * loss(model, batch)}),
        ("no tensor of one number", None, {"loss": lambda model, batch: logits(model, batch[0])}),
        ("no tensor of one number", None, {"loss": lambda model, batch: None}),
        (
            "NaN or infinity in the gradients",
            None,
            {"loss": root},
        ),
        ("num_batches=0 is not", None, {"num_batches": 0}),
        ("num_batches='all' is not", None, {"num_batches": "all"}),
        ("adapter_name='other' does not exist", None, {"adapter_name": "other"}),
    ],
)
def test_what_gives_no_gradient_is_refused(match, data, settings):
    refused(adapt(make_backbone("vit")), match, None if data is None else data(), **settings)


@pytest.mark.parametrize("how", ["trained", "authors", "merged"])
def test_an_adapter_that_is_not_new_is_refused(how):
    model = adapt(make_backbone("vit"), **({"init_weights": True} if how == "authors" else {}))
    if how == "trained":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "fact_Sigma" in n)[0, 0, 0] = 1e-8
    elif how == "merged":
        model.merge_adapter()
    refused(
        model, "is merged" if how == "merged" else "are not zero: it is trained already, or .*init_weights='orthogonal'"
    )
