"""The method is exactly the paper's.

Compared with the equations written out in float64 (benchmarks/exactness.py), with tensorly's reconstructions, and with
a network whose weights were replaced by W + dW.
"""

import copy
import dataclasses

import pytest
import torch
from backbones import BACKBONES, images, logits, make_backbone
from peft import get_peft_model

from benchmarks.bytes.parameter_counts import ROWS, adapt, adapter_bytes
from benchmarks.exactness.equations import errors, reference_increment
from fact_peft import FacTConfig, FacTLinear
from fact_peft.method.decomposition import DECOMPOSITIONS, contract, core_matrix, expand, increment, low_rank_pair

# Rounding of one product of a few hundred terms; the frozen layer alone is allowed, and shows, the same.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BLOCKS = [(1, 1), (1, 3), (1, 4), (4, 1), (2, 3)]


def random_factors(decomposition, in_width=6, out_width=5, num_slices=6, rank=3):
    torch.manual_seed(0)
    shapes = DECOMPOSITIONS[decomposition].shapes(in_width, out_width, num_slices, rank)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48), (48, 144), (48, 80)])
def test_layer_matches_the_equations(shape, decomposition, dtype):
    _, forward, merged = errors(shape, decomposition, dtype, rank=5)
    assert forward < TOLERANCE[dtype]
    assert merged < TOLERANCE[dtype]


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_model_matches_one_whose_weights_were_replaced(backbone, decomposition):
    config = FacTConfig(rank=4, decomposition=decomposition, scale=3.0, init_weights=False, modules_to_save=[])
    model = get_peft_model(make_backbone(backbone, torch.float64), config)
    replaced = make_backbone(backbone, torch.float64)
    pixels = images(torch.float64)
    before = logits(replaced, pixels)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, FacTLinear):
            slices = layer.fact_slices["default"]
            factors = model.get_base_model().factors[slices.stack].factors("default")
            replaced.get_submodule(name).weight.data += reference_increment(factors, slices, config.scale).T
    # The factors are float32 numbers; everything after them is float64.
    torch.testing.assert_close(logits(model.double(), pixels), logits(replaced, pixels), rtol=1e-12, atol=1e-12)
    assert (logits(replaced, pixels) - before).abs().max() > 1e-3


@pytest.mark.parametrize("num_in_blocks, num_out_blocks", BLOCKS)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_forward_increment_and_low_rank_pair_agree(decomposition, num_in_blocks, num_out_blocks):
    factors = random_factors(decomposition)
    cores = DECOMPOSITIONS[decomposition].cores(factors, 0, num_in_blocks * num_out_blocks)
    core = core_matrix(cores.unflatten(0, (num_in_blocks, num_out_blocks)))
    U, V = factors["U"], factors["V"]
    x = torch.randn(2, 7, num_in_blocks * 6, dtype=torch.float64)
    y = torch.randn(2, 7, num_out_blocks * 5, dtype=torch.float64)
    expected = y + x @ increment(U, core, V, 0.7)
    torch.testing.assert_close(expand(contract(x, U, core), V, 0.7, onto=y), expected)
    A, B = low_rank_pair(U, core, V, 0.7)
    assert len(A) == min(num_in_blocks, num_out_blocks) * 3
    torch.testing.assert_close(y + x @ (B @ A).T, expected)


def test_tensor_train_matches_tensorly():
    tt_to_tensor = pytest.importorskip("tensorly.tt_tensor").tt_to_tensor
    factors = random_factors("tt")
    # (N, d, e) with the slice index in the middle core, as in the paper: U, Sigma, V from left to right.
    train = [factors["U"][None], factors["Sigma"].transpose(0, 1), factors["V"].T[:, :, None]]
    dense = torch.from_numpy(tt_to_tensor([core.numpy() for core in train])).transpose(0, 1)
    cores = DECOMPOSITIONS["tt"].cores(factors, 0, 6)
    for k in range(6):
        torch.testing.assert_close(increment(factors["U"], cores[k], factors["V"], 1.0), dense[k])


def test_tucker_matches_tensorly():
    tensorly = pytest.importorskip("tensorly")
    factors = random_factors("tk")
    modes = [factors[name].numpy() for name in ("P", "U", "V")]
    dense = torch.from_numpy(tensorly.tucker_to_tensor((tensorly.tensor(factors["C"].numpy()), modes)))
    cores = DECOMPOSITIONS["tk"].cores(factors, 0, 6)
    for k in range(6):
        torch.testing.assert_close(increment(factors["U"], cores[k], factors["V"], 1.0), dense[k])


@pytest.mark.parametrize("num_in_blocks, num_out_blocks", BLOCKS)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gradients(decomposition, num_in_blocks, num_out_blocks):
    factors = random_factors(decomposition, in_width=3, out_width=2, rank=2)
    names = list(factors)

    def forward(x, y, *values):
        named = dict(zip(names, values, strict=True))
        cores = DECOMPOSITIONS[decomposition].cores(named, 0, num_in_blocks * num_out_blocks)
        core = core_matrix(cores.unflatten(0, (num_in_blocks, num_out_blocks)))
        return expand(contract(x, named["U"], core), named["V"], 0.7, onto=y)

    x = torch.randn(2, num_in_blocks * 3, dtype=torch.float64)
    y = torch.randn(2, num_out_blocks * 2, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, y, *factors.values())]
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_fused_qkv_equals_separate_q_k_and_v(decomposition):
    config = FacTConfig(rank=4, decomposition=decomposition, init_weights=False)
    fused = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 96)), _targets(config, ["0"]))
    separate = get_peft_model(torch.nn.ModuleDict({n: torch.nn.Linear(32, 32) for n in "qkv"}), _targets(config, "qkv"))
    for name, holder in separate.base_model.model.factors["32x32"].named_parameters():
        holder.data.copy_(dict(fused.base_model.model.factors["32x32"].named_parameters())[name])
    parts = [separate.base_model.model[name].get_delta_weight("default") for name in "qkv"]
    torch.testing.assert_close(fused.base_model.model[0].get_delta_weight("default"), torch.cat(parts))


def _targets(config, names):
    return FacTConfig(
        rank=config.rank, decomposition=config.decomposition, init_weights=False, target_modules=list(names)
    )


def test_authors_initialisation():
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=8, init_weights=True))
    factors = model.get_base_model().factors["32x32"].factors("default")
    assert not factors["V"].any()
    for name, fan_in in (("U", 32), ("Sigma", 8)):
        bound = fan_in**-0.5
        assert 0.9 * bound < factors[name].abs().max() <= bound
    torch.testing.assert_close(logits(model.eval(), images()), logits(make_backbone("vit"), images()))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"rank": 8}, 4.0), ({"rank": 8, "scale": 0.1}, 0.1), ({"init_weights": True}, 1.0),
     ({"init_weights": False}, 1.0), ({"decomposition": "tk"}, 8.0), ({"decomposition": "cp", "rank": 64}, 4.0)],
)  # fmt: skip
def test_the_default_scale_follows_from_start_and_rank(settings, scale, tmp_path):
    config = FacTConfig(**settings)
    assert config.scale == scale
    config.save_pretrained(tmp_path)
    assert FacTConfig.from_pretrained(tmp_path).scale == scale


@pytest.mark.parametrize("how", ["replace", "copy"])
def test_the_default_scale_follows_the_rank_of_a_copy_until_it_is_set(how):
    def with_rank(config, rank):
        if how == "replace":
            return dataclasses.replace(config, rank=rank)
        config = copy.copy(config)
        config.rank = rank
        return config

    assert with_rank(FacTConfig(), 4).scale == FacTConfig(rank=4).scale == 8.0
    assert with_rank(with_rank(FacTConfig(), 4), 2).scale == 16.0
    assert with_rank(FacTConfig(scale=3.0), 4).scale == 3.0
    model = get_peft_model(make_backbone("vit"), FacTConfig())
    assert with_rank(model.peft_config["default"], 4).scale == 8.0
    config = FacTConfig()
    config.scale = 5.0
    assert with_rank(config, 4).scale == 5.0


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("rank", [4, 16])
def test_the_first_step_of_adam_moves_increments_equally_far(decomposition, rank):
    torch.manual_seed(0)
    form, scale = DECOMPOSITIONS[decomposition], FacTConfig(rank=rank, decomposition=decomposition).scaling
    factors = {name: torch.empty(shape, dtype=torch.float64) for name, shape in form.shapes(32, 32, 200, rank).items()}
    form.init(factors, "orthogonal")
    signs = torch.randint(0, 2, factors[form.core_factors[-1]].shape) * 2.0 - 1
    factors[form.core_factors[-1]] += 1e-3 * signs  # as AdamW does at a rate of 1e-3, whatever the gradient
    U, cores, V = form.terms(factors)
    norms = (scale * U @ cores @ V.T).flatten(1).norm(dim=1)
    # U and V are orthonormal in float32. C of Tucker is random; its cores have norms of about 1, nearly orthogonal.
    torch.testing.assert_close(norms.mean().item(), 32e-3, rtol=0.1 if decomposition == "tk" else 1e-6, atol=0)


def test_the_default_start_is_the_orthogonal_one():
    model = get_peft_model(make_backbone("vit"), FacTConfig())
    factors = model.get_base_model().factors["32x32"].factors("default")
    torch.testing.assert_close(factors["U"].T @ factors["U"], torch.eye(16))
    torch.testing.assert_close(factors["V"].T @ factors["V"], torch.eye(16))
    assert not factors["Sigma"].any()
    torch.testing.assert_close(logits(model.eval(), images()), logits(make_backbone("vit"), images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_orthogonal_initialisation(decomposition, dtype):
    torch.manual_seed(0)
    shapes = DECOMPOSITIONS[decomposition].shapes(in_width=24, out_width=16, num_slices=6, rank=4)
    factors = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}
    DECOMPOSITIONS[decomposition].init(factors, "orthogonal")
    for name in ("U", "V"):
        gram = factors[name].float().T @ factors[name].float()
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=TOLERANCE[dtype])
    assert not DECOMPOSITIONS[decomposition].cores(factors, 0, 6).any()


@pytest.mark.parametrize("init_weights", [True, "orthogonal"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_every_factor_learns_from_the_second_step_on(decomposition, init_weights):
    torch.manual_seed(0)
    model = make_backbone("vit")
    model = get_peft_model(model, FacTConfig(rank=4, decomposition=decomposition, init_weights=init_weights))
    factors = model.get_base_model().factors["32x32"].factors("default")
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    optimizer = torch.optim.SGD(factors.values(), lr=1.0)
    for _ in range(2):
        torch.nn.functional.cross_entropy(logits(model, images()), torch.arange(3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(factors[name], before[name]) for name in factors)


@pytest.mark.parametrize("backbone, decomposition, rank, published", ROWS)
def test_parameter_counts_are_the_papers(backbone, decomposition, rank, published):
    model = adapt(backbone, decomposition, rank)
    assert model.get_nb_trainable_parameters()[0] == published
    assert 4 * published <= adapter_bytes(model) <= 4 * published + 2048
    if (backbone, decomposition, rank) == ("ViT-B/16", "tt", 4):
        assert adapter_bytes(model) <= 33_792 + 1024
