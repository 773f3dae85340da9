"""Adapters and heads in few bits: what the bytes say, what rounding costs, and that every way in gives the same."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from backbones import image_processor, images, logits, make_backbone
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fact_peft import (
    Adapter,
    AdapterPool,
    FacTConfig,
    FacTLinear,
    hotswap_adapter,
    load_image_classifier,
    quantize_adapter,
    save_as_lora,
    save_image_classifier,
)
from fact_peft.adapter.storage import STORAGES, WIDTHS, bits_of, is_packed, pack, unpack
from fact_peft.method.decomposition import DECOMPOSITIONS
from fact_peft.operations.inspection import task_bytes

PACKED = [f"int{bits}" for bits in WIDTHS]
SHAPES = [(1,), (7,), (64,), (65,), (129,), (3, 5), (10, 33), (6, 4, 4), (2, 1, 3, 5)]
FILE = "adapter_model.safetensors"
# Of increments, relative. Three factors are rounded, of which each changes by half a unit in the last place at most for
# floats, and by 0.6, 9.5 and 34 % of its norm on average for normal numbers in 8, 4 and 2 bits.
CHANGES = {"float32": 0, "float16": 2e-3, "bfloat16": 2e-2, "int8": 0.02, "int4": 0.25, "int2": 0.9}
HEAD = "base_model.model.classifier.weight"


def adapted(decomposition="tt", backbone="vit", seed=0, **settings):
    model = make_backbone(backbone)
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        FacTConfig(**{"rank": 4, "decomposition": decomposition, "init_weights": False, "scale": 3.0, **settings}),
    ).eval()


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


def increments(model):
    layers = [module for module in model.modules() if isinstance(module, FacTLinear)]
    return torch.cat([layer.get_delta_weight(layer.active_adapters[0]).flatten() for layer in layers])


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(packed):
    """The numbers of a packed tensor, from the description of the layout in `storage.py` and numpy alone."""
    data = packed.numpy().tobytes()
    magic, version, bits, group, num_dimensions = struct.unpack_from("<4sBBBB", data)
    assert (magic, version) == (b"FacT", 2)
    assert struct.unpack_from("<I", data, 8) == (zlib.crc32(data[12:]),)
    shape = struct.unpack_from(f"<{num_dimensions}I", data, 12)
    count, start = int(np.prod(shape)), 12 + 4 * num_dimensions
    num_groups = -(-count // group)
    raised = np.frombuffer(data, "<u2", num_groups, start).astype("<u4") << 16  # bfloat16: a float32's upper half
    scales = raised.view("<f4")
    stream = np.unpackbits(np.frombuffer(data, "u1", offset=start + 2 * num_groups), bitorder="little")
    codes = stream.reshape(-1, bits) @ (1 << np.arange(bits))
    q = codes[:count] - 2 ** (bits - 1)
    return ((q + 0.5) * scales[np.arange(count) // group].astype(float)).reshape(shape)


# The bytes


@pytest.mark.parametrize("bits, shape", list(itertools.product(WIDTHS, SHAPES)), ids=str)
def test_packed_bytes_are_what_the_layout_says(bits, shape):
    tensor = random(shape)
    packed = pack(tensor, bits)
    count = int(np.prod(shape))
    assert len(packed) == 12 + 4 * len(shape) + 2 * -(-count // 64) + -(-count * bits // 8)
    np.testing.assert_array_equal(unpack(packed).double().numpy(), decoded(packed))


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_was_unpacked_is_packed_to_the_same_bytes(bits):
    generator = torch.Generator().manual_seed(bits)
    for trial in range(60):
        count = int(torch.randint(1, 200, (), generator=generator))
        numbers = torch.randn(count, generator=generator) * 10 ** (4 * torch.randn((), generator=generator))
        numbers[torch.rand(count, generator=generator) < trial % 3 / 3] = 0
        packed = pack(numbers, bits)
        assert torch.equal(pack(unpack(packed), bits), packed), trial


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_default_device_does_not_matter(bits):
    tensor = torch.randn(7, 33)
    expected = pack(tensor, bits)
    with torch.device("meta"):  # where no constant has a value
        packed = pack(tensor, bits)
        unpacked = unpack(packed)
    assert torch.equal(packed, expected)
    assert torch.equal(unpacked, unpack(expected))


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_number_is_further_than_half_a_step_unless_clipped_and_no_scale_does_better(bits):
    numbers = random((4, 64))
    packed = pack(numbers, bits)
    error = (unpack(packed) - numbers).square().sum(1)
    half = 2 ** (bits - 1)
    for ratio in np.linspace(0.2, 1.2, 101):  # every other scale, and the nearest of its levels by search
        scale = ratio * numbers.abs().amax(1, keepdim=True) / (half - 0.5)
        levels = (torch.arange(-half, half) + 0.5) * scale[..., None]
        nearest = (numbers[..., None] - levels).abs().amin(-1)
        # To the coarseness of the ratios that `pack` tries: in 8 bits the luck of 64 numbers with their levels is left.
        assert (error <= {8: 1.5}.get(bits, 1.02) * nearest.square().sum(1)).all()


def test_zeros_stay_zeros_and_very_small_numbers_keep_their_precision():
    assert torch.equal(unpack(pack(torch.zeros(5, 70), 4)), torch.zeros(5, 70))
    small = 1e-12 * random((64,))
    torch.testing.assert_close(unpack(pack(small, 8)), small, rtol=0, atol=1e-12 * 0.02)


# The form before rounding


# Everywhere


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_loader_gives_the_same_numbers_and_saving_again_the_same_bytes(storage, decomposition, tmp_path):
    model = adapted(decomposition, storage=storage)
    exact = scores(model)
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(scores(model), exact)  # saving leaves the model as it is
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "a")
    expected = scores(loaded)
    assert (storage == "float32") == torch.equal(expected, exact)
    before, after = increments(model), increments(loaded)
    assert (after - before).norm() <= CHANGES[storage] * before.norm()

    loaded.save_pretrained(tmp_path / "b")
    for file in (FILE, "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    second = adapted(decomposition, seed=5)
    second.load_adapter(tmp_path / "a", "second")
    second.set_adapter("second")
    assert torch.equal(scores(second), expected)

    attached = make_backbone("vit")
    Adapter.read(tmp_path / "a").attach(attached)
    assert torch.equal(scores(attached), expected)
    Adapter.of(attached).write(tmp_path / "c")
    assert Adapter.of(attached).config.storage == storage
    original, written = load_file(tmp_path / "a" / FILE), load_file(tmp_path / "c" / FILE)
    assert original.keys() == written.keys() and all(torch.equal(original[key], written[key]) for key in original)

    swapped = adapted(decomposition, seed=5)
    hotswap_adapter(swapped, tmp_path / "a")
    assert torch.equal(scores(swapped), expected)
    assert swapped.peft_config["default"].storage == storage

    from_memory = adapted(decomposition, seed=5)
    set_peft_model_state_dict(from_memory, get_peft_model_state_dict(loaded))
    assert torch.equal(scores(from_memory), expected)

    pool = AdapterPool(make_backbone("vit"))
    pool.load("disk", tmp_path / "a")
    pool.load("memory", (loaded.peft_config["default"], get_peft_model_state_dict(loaded)))
    for name in ("disk", "memory"):
        answers = pool(images(), [name] * 3)
        torch.testing.assert_close(torch.stack([answer.logits for answer in answers]), expected, rtol=1e-4, atol=1e-4)

    quantize_adapter(model, storage)
    assert torch.equal(scores(model), expected)


def test_lora_export_has_the_numbers_in_memory(tmp_path):
    model = adapted(storage="int4")
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    torch.testing.assert_close(scores(lora), scores(model), rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].storage == "int4"


@pytest.mark.parametrize("backbone", ["swin", "timm", "deit"])
def test_other_backbones_with_biases(backbone, tmp_path):
    model = adapted("tk", backbone, storage="int4", head_storage="int2", bias="all")
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(make_backbone(backbone), tmp_path / "a")
    quantize_adapter(model, "int4", "int2")
    assert torch.equal(scores(loaded), scores(model))
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_pickled_files_hold_packed_numbers_too(tmp_path):
    model = adapted(storage="int4")
    model.save_pretrained(tmp_path, safe_serialization=False)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    quantize_adapter(model, "int4")
    assert torch.equal(scores(loaded), scores(model))


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_transformers_own_loader_does_not_compute_with_a_packed_file_it_cannot_read(ignore_mismatched_sizes, tmp_path):
    adapted(storage="int4").save_pretrained(tmp_path)
    model = make_backbone("vit")
    if ignore_mismatched_sizes:
        model.load_adapter(str(tmp_path), ignore_mismatched_sizes=True)
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=r"were not loaded.*int4.*PeftModel\.from_pretrained"):
        model(images())


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_mean_of_packed_files_is_refused(bits):
    """As federated averaging computes it: the mean of the bytes, cast back."""
    files = [pack(random((16, 16)) * scale, bits) for scale in (1, 2, 3)]
    mean = torch.stack([file.float() for file in files]).mean(0).to(torch.uint8)
    with pytest.raises(ValueError, match="checksum"):
        unpack(mean)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("storage", PACKED)
def test_the_basis_of_the_factors_is_that_of_the_model(storage, decomposition, tmp_path):
    """So that unpacked factors of several clients can be averaged, and moments of an optimizer go on to fit."""
    model = adapted(decomposition, storage=storage)
    model.save_pretrained(tmp_path)
    exact, saved = Adapter.of(model).factors["32x32"], Adapter.read(tmp_path).factors["32x32"]
    for letter, factor in exact.items():
        assert torch.equal(saved[letter], unpack(pack(factor, bits_of(storage))))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_float_stays_finite(bits):
    assert unpack(pack(torch.full((3,), torch.finfo(torch.float32).max), bits)).isfinite().all()


def test_heads_have_their_own_storage_and_by_default_no_less_than_8_bits(tmp_path):
    for storage, head_storage, expected in (
        ("int2", None, 8),
        ("int4", "int4", 4),
        ("int8", "bfloat16", torch.bfloat16),
        ("float16", None, torch.float16),
        (None, "int8", 8),
    ):
        folder = tmp_path / f"{storage}-{head_storage}"
        adapted(storage=storage, head_storage=head_storage).save_pretrained(folder)
        tensors = load_file(folder / FILE)
        head = tensors[HEAD]
        assert (head[5] if is_packed(head) else head.dtype) == expected
        assert tensors["base_model.model.classifier.bias"].dtype != torch.uint8
        assert torch.isfinite(scores(PeftModel.from_pretrained(make_backbone("vit"), folder))).all()


def test_without_a_storage_the_data_types_are_those_of_the_model(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.float32}


@torch.no_grad()
def test_a_number_beyond_float16_is_refused_by_name_and_bfloat16_takes_it(tmp_path):
    model = adapted(storage="float16")
    model.get_base_model().classifier.modules_to_save["default"].bias[0] = 1e6
    for storage in ("float16", "int4"):  # whose biases are float16
        with pytest.raises(ValueError, match=r"bias holds numbers up to 1e\+06, .* save it with storage='bfloat16'"):
            quantize_adapter(model, storage)
    assert model.peft_config["default"].storage == "float16"
    quantize_adapter(model, "bfloat16")


@pytest.mark.parametrize("storage", ["int3", "fp8", 8, True])
def test_an_unknown_storage_is_refused_where_it_is_named(storage, tmp_path):
    message = r"storage=.* is unknown; choose one of 'float32', 'float16', 'bfloat16', 'int8', 'int4', 'int2'"
    with pytest.raises(ValueError, match=message):
        FacTConfig(storage=storage)
    model = adapted()
    with pytest.raises(ValueError, match=message):
        quantize_adapter(model, storage)
    with pytest.raises(ValueError, match=message):
        save_image_classifier(model, image_processor(), tmp_path, head_storage=storage)
    model.peft_config["default"].storage = storage
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


# Damage


def rewritten(folder, name, change):
    tensors = load_file(folder / FILE)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def with_byte(position, value):
    def change(packed):
        packed[position] = value
        return packed

    return change


SIGMA = "base_model.model.factors.32x32.fact_Sigma"


def sealed(change):
    """A change that takes the checksum along, as only somebody who knows the layout could make."""

    def change_and_seal(packed):
        changed = change(packed)
        checksum = zlib.crc32(changed[12:].numpy().tobytes())
        changed[8:12] = torch.tensor(list(struct.pack("<I", checksum)), dtype=torch.uint8)
        return changed

    return change_and_seal


DAMAGES = {
    "magic": (with_byte(0, 0), "bytes that are no packed tensor, int4 by the config|uint8, not of floats"),
    "version": (with_byte(4, 1), "version 1 of the layout, of which this fact_peft knows 2"),
    "bits": (with_byte(5, 3), "3 bits in groups of 64; known are"),
    "other bits": (lambda packed: pack(unpack(packed), 8), "packed as int8 in the file, int4 by the config"),
    "group": (with_byte(6, 32), "bytes where .* in groups of 32 take"),
    "dimensions": (with_byte(7, 200), "200 dimensions"),
    "checksum": (with_byte(8, 7), "the checksum is wrong"),
    "a code": (with_byte(-1, 7), "the checksum is wrong"),
    "shape": (sealed(with_byte(12, 7)), r"bytes where \[7, "),
    "other shape": (lambda packed: pack(unpack(packed).flatten(0, 1), 4), r"\(96, 4\) in the file, \(24, 4, 4\)"),
    "cut": (sealed(lambda packed: packed[:-3].clone()), "bytes where"),
    "cut to the preamble": (sealed(lambda packed: packed[:14].clone()), "fewer bytes than its dimensions take"),
    "longer": (sealed(lambda packed: torch.cat([packed, packed[:1]])), "bytes where"),
    "scale": (sealed(with_byte(25, 255)), "scales that are negative or not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_layouts_are_refused_by_name_before_the_model_is_touched(damage, tmp_path):
    adapted(storage="int4").save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    rewritten(tmp_path, SIGMA, change)
    backbone = make_backbone("vit")
    with pytest.raises(ValueError, match=f"(?s)(fact_Sigma.*({message})|({message}).*fact_Sigma)"):
        PeftModel.from_pretrained(backbone, tmp_path)
    assert backbone.state_dict().keys() == make_backbone("vit").state_dict().keys()


def test_a_damaged_head_is_refused_by_name(tmp_path):
    adapted(storage="int4").save_pretrained(tmp_path)
    rewritten(tmp_path, HEAD, with_byte(1, 0))
    with pytest.raises(ValueError, match=r"classifier\.weight is \d+ bytes that are no packed tensor, int8 by the"):
        PeftModel.from_pretrained(make_backbone("vit"), tmp_path)


def test_bits_behind_the_last_number_are_refused():
    packed = pack(random((3,)), 4)
    packed = sealed(with_byte(-1, int(packed[-1]) | 0xF0))(packed)
    with pytest.raises(ValueError, match="bits set behind the last number"):
        unpack(packed)


def test_state_dict_with_damage_leaves_the_adapter_as_it_was():
    model, state = adapted(), get_peft_model_state_dict(adapted(seed=1, storage="int8"))
    state[SIGMA] = state[SIGMA][:-1]
    expected = scores(model)
    with pytest.raises(ValueError, match=r"fact_Sigma.*packed in a way that cannot be read"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(scores(model), expected)


def test_a_classifier_is_saved_in_few_bits_by_one_argument(tmp_path, run_module):
    backbone = make_backbone("vit")
    backbone.save_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    model = get_peft_model(
        type(backbone).from_pretrained(tmp_path / "backbone"), FacTConfig(rank=4, init_weights=False)
    ).eval()
    processor = image_processor()
    save_image_classifier(model, processor, tmp_path / "whole")
    save_image_classifier(model, processor, tmp_path / "few", storage="int4")
    assert model.peft_config["default"].storage is None
    loaded, _ = load_image_classifier(tmp_path / "few")
    quantize_adapter(model, "int4")
    assert torch.equal(scores(loaded), scores(model))

    few, whole = (task_bytes(Adapter.read(tmp_path / name), tmp_path / name) for name in ("few", "whole"))
    files = [tmp_path / "few" / name for name in (FILE, "adapter_config.json")]
    assert few.total == sum(file.stat().st_size for file in files)
    assert few.factors < whole.factors / 5 and few.others < whole.others / 2
    card = (tmp_path / "few" / "README.md").read_text()
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if ".fact_" in name)
    assert f"| parameters of the factors | {trained:,} |" in card
    assert "| stored as | int4, head int8 |" in card
    assert f"| bytes on disk, head and config included | {few.total:,} |" in card
    printed = run_module("fact_peft", "show", tmp_path / "few")
    assert "storage     int4, head int8" in printed
    assert f"bytes       {few.total:,}: {few.factors:,} factors, {few.others:,} head and others" in printed


def test_norms_without_the_base_model_are_of_the_rounded_numbers(tmp_path):
    model = adapted(storage="int2")
    model.save_pretrained(tmp_path)
    quantize_adapter(model, "int2")
    adapter = Adapter.read(tmp_path)
    for name, layer in model.named_modules():
        if isinstance(layer, FacTLinear):
            slices = adapter.slices[name.removeprefix("base_model.model.")]
            factors = adapter.factors[slices.stack]
            assert torch.equal(factors["U"], layer.fact_stacks["default"].fact_U["default"])
    assert bits_of(adapter.config.storage) == 2
