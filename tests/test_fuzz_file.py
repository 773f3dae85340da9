"""Adapter files that are damaged or forged in any way: refused without a trace, or loaded to finite numbers."""

import json
import shutil
import warnings

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fact_peft import Adapter, FacTConfig, hotswap_adapter
from fact_peft.operations.inspection import describe

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FILE = "adapter_model.safetensors"
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


def adapted(seed=0, decomposition="tt"):
    model = make_backbone("vit")
    torch.manual_seed(seed)
    return get_peft_model(model, FacTConfig(rank=4, decomposition=decomposition, init_weights=False)).eval()


@pytest.fixture(scope="module", params=["tt", "tk"])
def whole(request, tmp_path_factory):
    """A good adapter."""
    folder = tmp_path_factory.mktemp("whole")
    adapted(seed=1, decomposition=request.param).save_pretrained(folder)
    return folder, request.param


def state_of(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    configs = {name: dict(vars(config)) for name, config in getattr(model, "peft_config", {}).items()}
    with torch.no_grad():
        return state, modules, trained, configs, logits(model, images(count=2))


def plain_name(name):
    """The name of a weight in the network before it was adapted."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def unchanged(before, after):
    assert before[0].keys() == after[0].keys() and before[1:4] == after[1:4]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert torch.equal(before[4], after[4])


# What is done to the file. `data` draws where and how.


def flip(folder, data):
    content = bytearray((folder / FILE).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        # Half of them in the header, a few hundred bytes of many thousand.
        position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 600))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / FILE).write_bytes(content)


def cut_or_append(folder, data):
    content = (folder / FILE).read_bytes()
    longer = content + data.draw(st.binary(max_size=20))
    (folder / FILE).write_bytes(longer[: data.draw(st.integers(0, len(longer)))])


def edit_header(folder, data):
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(header)))
    values = st.sampled_from([None, 0, -1, 2**63, "F32", "F8_E4M3", [], [0, 0], [0, 10**12], [2**40, 2**40], {}])
    if key != "__metadata__" and data.draw(st.booleans()):
        header[key][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(values)
    else:
        header[key] = data.draw(values)
    text = json.dumps(header)
    if data.draw(st.booleans()):  # the same key twice
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    encoded = text.encode()
    (folder / FILE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def change_tensors(folder, data):
    tensors = load_file(folder / FILE)
    key = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors.pop(key)
    names = ["", ".", "fact_U", "base_model.model.vit.layernorm.weight", "base_model.model.factors.32x32.fact_X"]
    names += [f"{key}.default", f"{key}.", key.removeprefix("base_model.model."), key.upper(), "\x1b[31m", *tensors]
    what = data.draw(st.sampled_from(["remove", "rename", "add", "dtype", "shape", "values"]))
    if what == "rename":
        tensors[data.draw(st.sampled_from(names))] = value
    elif what == "add":
        tensors[key] = value
        tensors[data.draw(st.sampled_from(names))] = value.clone()
    elif what == "dtype":
        tensors[key] = value.to(data.draw(st.sampled_from(DTYPES)))
    elif what == "shape":
        shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (*reversed(value.shape),)]))
        tensors[key] = data.draw(st.sampled_from([value.reshape(shape), value[:0], value[:1], value.new_zeros(())]))
    elif what == "values":
        value.view(-1)[0] = data.draw(st.sampled_from([torch.nan, torch.inf, 1e38, -0.0, 1e-45]))
        tensors[key] = value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


DAMAGES = [flip, cut_or_append, edit_header, change_tensors]
LOADS = {
    "from_pretrained": (lambda model: model, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "load_adapter": (get_peft_model, lambda model, folder: model.load_adapter(folder, "other")),
    "load_adapter over": (get_peft_model, lambda model, folder: model.load_adapter(folder, "default")),
    "hotswap": (get_peft_model, hotswap_adapter),
    "attach": (lambda model: model, lambda model, folder: Adapter.read(folder).attach(model)),
    "attach beside": (get_peft_model, lambda model, folder: Adapter.read(folder).attach(model, "other")),
}


@pytest.mark.parametrize("way", LOADS)
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_damaged_file_is_refused_without_a_trace_or_loaded_to_finite_numbers(damage, way, whole, tmp_path):
    source, decomposition = whole
    adapt, load = LOADS[way]

    @settings(
        max_examples=5,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.data())
    def check(data):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        damage(tmp_path, data)
        model = make_backbone("vit")
        if adapt is get_peft_model:
            torch.manual_seed(0)
            config = FacTConfig(rank=4, decomposition=decomposition, init_weights=False)
            model = get_peft_model(model, config).eval()
        before = state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read = Adapter.read(tmp_path)
            except ValueError:
                read = None
            else:
                describe(read)
            try:
                loaded = load(model, tmp_path)
            except (ValueError, SafetensorError):  # the second is PEFT's, where it reads the file and not the config
                unchanged(before, state_of(model))
                return
            except KeyError as error:
                # PEFT's own, for any method: a head that the file lacks is missed when the layers are already there.
                assert "classifier." in str(error)
                return
        loaded = loaded if isinstance(loaded, PeftModel) else model
        assert read is not None, "was loaded, but could not be read"
        state, _, _, _, outputs = state_of(loaded)
        assert all(torch.isfinite(value).all() for value in state.values())
        assert outputs.shape == before[4].shape
        network = make_backbone("vit").state_dict()
        for name, value in state.items():
            if ".fact_" not in name and ".modules_to_save." not in name:
                assert torch.equal(value, network[plain_name(name)]), f"{name} was overwritten"

    check()
