"""The pool says of every image what PEFT's model says of it alone, whatever is loaded, moved or replaced meanwhile."""

import copy
import gc
import random
import threading

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Swinv2Config, Swinv2ForImageClassification

from fact_peft import Adapter, AdapterPool, FacTConfig, Prediction
from fact_peft.method.decomposition import DECOMPOSITIONS

BACKBONES = ["vit", "deit", "swin", "timm"]


def make_adapter(folder, backbone="vit", seed=0, num_labels=5, labels=None, **settings):
    """Save an adapter with every number random; return what PEFT says of `images()` with it."""
    torch.manual_seed(seed)
    model = make_backbone(backbone)
    if num_labels != 5:
        model.classifier = nn.Linear(32, num_labels)
        model.config.num_labels = num_labels
    settings = {"rank": 4, "scale": 1.5, "init_weights": False, "labels": labels, **settings}
    model = get_peft_model(model, FacTConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        return logits(model, images())


def test_layers_that_no_adapter_adapts_may_be_called_with_other_than_images():
    """In Swin v2, linear layers make the biases of positions, once for all images."""
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2]}
    torch.manual_seed(0)
    swin = Swinv2ForImageClassification(Swinv2Config(window_size=4, **shape)).eval()
    adapted = get_peft_model(copy.deepcopy(swin), FacTConfig(rank=4, init_weights=False)).eval()
    pool, pixels = AdapterPool(swin), torch.randn(3, 3, 32, 32)
    pool.load("one", Adapter.of(adapted))
    answers = pool(pixels, ["one", None, "one"])
    with torch.no_grad():
        for answer, model, image in zip(answers, (adapted, swin, adapted), pixels, strict=True):
            torch.testing.assert_close(answer.logits, model(image[None]).logits[0])


def kinds(tmp_path, backbone):
    """Adapters of every kind in one pool, with what is expected of each."""
    layers = ["q_proj", "fc2"] if backbone != "timm" else ["qkv", "fc2"]
    settings = {
        "tt": {"rank": 4},
        "tk": {"rank": 3, "decomposition": "tk", "scale": -0.5},
        "small": {"rank": 1},
        "partial": {"rank": 5, "target_modules": layers, "modules_to_save": []},
        "named": {"rank": 4, "labels": list("abcde")},
    }
    if backbone == "vit":
        settings["seven"] = {"rank": 2, "num_labels": 7, "labels": list("abcdefg")}
    return {
        name: make_adapter(tmp_path / name, backbone, seed, **given)
        for seed, (name, given) in enumerate(settings.items())
    }


def same(prediction, expected, **tolerance):
    torch.testing.assert_close(prediction.logits, expected, **{"rtol": 0, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_image_its_adapters(backbone, tmp_path):
    expected = kinds(tmp_path, backbone)
    vit = make_backbone(backbone)
    with torch.no_grad():
        expected[None] = logits(vit, images())
    pool = AdapterPool(vit)
    for name in expected:
        if name is not None:
            pool.load(name, tmp_path / name)
    assert pool.names() == [name for name in expected if name is not None] and len(pool) == len(expected) - 1
    everything = list(expected)
    for asked in ([None, "tt", "tk"], ["partial", "named", "tt"], ["tt"] * 3, [None] * 3, ["__base__", "small", "tk"]):
        for image, (name, prediction) in enumerate(zip(asked, pool(images(), asked), strict=True)):
            name = None if name == "__base__" else name
            assert isinstance(prediction, Prediction) and prediction.adapter == name
            same(prediction, expected[name][image])
    one, several, none = pool(images(), ["tt", everything, []])
    same(one, expected["tt"][0])
    assert none == [] and [prediction.adapter for prediction in several] == everything
    for prediction in several:
        same(prediction, expected[prediction.adapter][1])
    # The model it was made of is as it was.
    with torch.no_grad():
        torch.testing.assert_close(logits(vit, images()), expected[None], rtol=0, atol=0)


def test_predictions_have_labels_and_scores(tmp_path):
    make_adapter(tmp_path / "a", labels=list("abcde"))
    make_adapter(tmp_path / "seven", num_labels=7, labels=list("tuvwxyz"))
    pool = AdapterPool(make_backbone("vit"))
    for name in ("a", "seven"):
        pool.load(name, tmp_path / name)
    a, seven, base = pool(images(), ["a", "seven", None])
    assert a.labels == list("abcde") and seven.labels == list("tuvwxyz") and len(seven.logits) == 7
    assert base.adapter is None and base.labels == [f"LABEL_{i}" for i in range(5)]
    torch.testing.assert_close(a.scores, a.logits.softmax(-1))
    top = seven.top(3)
    assert [label for label, _ in top] == [seven.labels[i] for i in seven.logits.argsort(descending=True)[:3].tolist()]
    assert top[0][1] == pytest.approx(seven.scores.max().item()) and len(seven.top(100)) == 7


def test_adapters_come_from_memory_too(tmp_path):
    expected = make_adapter(tmp_path)
    pool = AdapterPool(make_backbone("vit"))
    saved = Adapter.read(tmp_path)
    pool.load("saved", saved)
    pool.load("pair", (saved.config, load_file(tmp_path / "adapter_model.safetensors")))
    for image, prediction in enumerate(pool(images(), ["saved", "pair", "saved"])):
        same(prediction, expected[image])
    norms = pool.increment_norms("pair")
    assert norms == pytest.approx(saved.increment_norms())


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_storage_in_half_precision(dtype, atol, tmp_path):
    expected = make_adapter(tmp_path)
    exact, half = AdapterPool(make_backbone("vit")), AdapterPool(make_backbone("vit"), dtype=dtype)
    for pool in (exact, half):
        pool.load("a", tmp_path)
    assert half.stats()["bytes"] * 2 == exact.stats()["bytes"]
    for image, prediction in enumerate(half(images(), ["a", "a", None])[:2]):
        same(prediction, expected[image], atol=atol)


def test_a_model_in_half_precision_and_autocast(tmp_path):
    expected = make_adapter(tmp_path)
    pool = AdapterPool(make_backbone("vit"))
    pool.load("a", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        same(pool(images(), ["a", "a", None])[0], expected[0].bfloat16(), atol=0.1)
    half = AdapterPool(make_backbone("vit", torch.bfloat16))
    half.load("a", tmp_path)
    same(half(images(torch.bfloat16), ["a", "a", None])[0], expected[0].bfloat16(), atol=0.1)


# Loading, replacing, unloading


def test_replacing_and_unloading(tmp_path):
    first, second = make_adapter(tmp_path / "1"), make_adapter(tmp_path / "2", seed=1, rank=2, decomposition="tk")
    pool = AdapterPool(make_backbone("vit"))
    pool.load("a", tmp_path / "1")
    same(pool(images(), ["a"] * 3)[2], first[2])
    pool.load("a", tmp_path / "2")
    same(pool(images(), ["a"] * 3)[2], second[2])
    assert len(pool) == 1 and pool.stats()["resident"] == 1 and pool.stats()["loads"] == 2
    pool.unload("a")
    assert "a" not in pool and pool.stats()["bytes"] == 0
    with pytest.raises(ValueError, match=r"no adapter 'a' in the pool"):
        pool(images(), ["a"] * 3)
    with pytest.raises(ValueError, match=r"no adapter 'a' in the pool"):
        pool.unload("a")


def test_what_cannot_be_pooled_is_refused_and_changes_nothing(tmp_path):
    expected = make_adapter(tmp_path / "good")
    pool = AdapterPool(make_backbone("vit"))
    pool.load("a", tmp_path / "good")
    good = Adapter.read(tmp_path / "good")
    state = load_file(tmp_path / "good" / "adapter_model.safetensors")

    def changed(**changes):
        return good.config, {**state, **changes}

    make_adapter(tmp_path / "bias", bias="fact_only")
    make_adapter(tmp_path / "norm", modules_to_save=["classifier", "layernorm"])
    make_adapter(tmp_path / "head", target_modules=["fc1", "classifier"], modules_to_save=[])
    make_adapter(tmp_path / "swin", backbone="swin")
    get_peft_model(make_backbone("vit"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "cut").mkdir()
    for file in (tmp_path / "good").iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    U = "base_model.model.factors.32x32.fact_U"
    classifier = "base_model.model.classifier"
    refusals = [
        (tmp_path / "bias", r"'new' cannot be pooled: it has trained biases \(bias='fact_only'\)"),
        (tmp_path / "norm", r"trained vit.layernorm.weight, which is not part of the head \(classifier\)"),
        (tmp_path / "head", r"adapts classifier, which is no linear layer that this model calls outside its head"),
        (tmp_path / "swin", r"adapts swin.* another backbone"),
        (tmp_path / "lora", r"not a FacT adapter but one of PeftType.LORA"),
        (tmp_path / "cut", r"not a whole safetensors file"),
        (changed(**{U: state[U][:, :3]}), r"fact_U is \(32, 3\) in the file, \(32, 4\) by the config"),
        (changed(**{U: state[U] * float("nan")}), r"holds NaN"),
        ((good.config, {k: v for k, v in state.items() if k != U}), r"fact_U is missing in the file"),
        (changed(**{f"{classifier}.weight": torch.randn(5, 31)}), r"classifier.weight is \[5, 31\]"),
        (changed(**{f"{classifier}.weight": torch.randn(6, 32)}), r"different numbers of outputs"),
        ((good.config, {k: v for k, v in state.items() if k != f"{classifier}.bias"}), r"only weight is there"),
        (42, r"source is a int"),
    ]
    before = pool.stats()
    for source, message in refusals:
        for name in ("new", "a"):
            with pytest.raises(ValueError, match=message.replace("'new'", f"'{name}'")):
                pool.load(name, source)
    assert pool.names() == ["a"] and pool.stats() == before
    same(pool(images(), ["a"] * 3)[1], expected[1])
    for name in ("", "__base__", None):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            pool.load(name, tmp_path / "good")


def test_calls_and_models_that_are_refused(tmp_path):
    pool = AdapterPool(make_backbone("vit"))
    with pytest.raises(ValueError, match="not one entry for each of 3 images"):
        pool(images(), [None])
    with pytest.raises(ValueError, match="not one entry for each of 3 images"):
        pool(images(), "abc")
    with pytest.raises(ValueError, match="with adapters in it"):
        AdapterPool(get_peft_model(make_backbone("vit"), FacTConfig(rank=2)))
    with pytest.raises(ValueError, match="without a classification head"):
        AdapterPool(make_backbone("vit").vit)
    with pytest.raises(ValueError, match="only linear heads are pooled"):
        model = make_backbone("vit")
        model.classifier = nn.Sequential(nn.Linear(32, 5))
        AdapterPool(model)
    for settings in ({"device_capacity": 0}, {"host_capacity": -1}, {"device_capacity": 1.5}, {"host_capacity": 3}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AdapterPool(make_backbone("vit"), **settings)
    with pytest.raises(ValueError, match="dtype"):
        AdapterPool(make_backbone("vit"), dtype=torch.int8)


# Where the numbers lie


def test_least_recently_used_move_to_host_and_disk_and_back(tmp_path):
    expected = [make_adapter(tmp_path / str(i), seed=i) for i in range(6)]
    pool = AdapterPool(make_backbone("vit"), device_capacity=2, host_capacity=1, spill_folder=tmp_path / "spill")
    for i in range(6):
        pool.load(str(i), tmp_path / str(i))
    counts = {key: pool.stats()[key] for key in ("resident", "host", "disk", "evictions")}
    assert counts == {"resident": 2, "host": 1, "disk": 3, "evictions": 4}
    for _ in range(2):
        for i in (0, 5, 3):
            same(pool(images(), [str(i)] * 3)[1], expected[i][1])
    for row, prediction in enumerate(pool(images(), ["1", "2", "4"])):  # more than there is room for on the device
        same(prediction, expected[(1, 2, 4)[row]][row])
    stats = pool.stats()
    assert (stats["resident"], stats["host"], stats["disk"]) == (2, 1, 3)
    for i in range(6):
        pool.unload(str(i))
    assert not list((tmp_path / "spill").rglob("*.safetensors"))
    del pool
    gc.collect()
    assert not list((tmp_path / "spill").iterdir())


def test_an_adapter_that_was_used_stays(tmp_path):
    make_adapter(tmp_path)
    pool = AdapterPool(make_backbone("vit"), device_capacity=2)
    for name in ("a", "b"):
        pool.load(name, tmp_path)
    pool(images(), ["a"] * 3)
    pool.load("c", tmp_path)
    evictions = pool.stats()["evictions"]
    pool(images(), ["a", "c", "a"])
    assert pool.stats()["evictions"] == evictions  # both are on the device
    pool(images(), ["b"] * 3)
    assert pool.stats()["evictions"] == evictions + 1


def test_a_lost_file_is_reported_and_the_others_go_on(tmp_path):
    for i in range(3):
        make_adapter(tmp_path / str(i), seed=i)
    pool = AdapterPool(make_backbone("vit"), device_capacity=1, host_capacity=0, spill_folder=tmp_path / "spill")
    for i in range(3):
        pool.load(str(i), tmp_path / str(i))
    for file in (tmp_path / "spill").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="spill_folder"):
        pool(images(), ["0"] * 3)
    pool(images(), ["2"] * 3)
    pool.load("0", tmp_path / "0")
    pool(images(), ["0"] * 3)


def test_a_full_disk_refuses_the_new_adapter_and_loses_none(tmp_path, monkeypatch):
    expected = [make_adapter(tmp_path / str(i), seed=i) for i in range(3)]
    pool = AdapterPool(make_backbone("vit"), device_capacity=1, host_capacity=1, spill_folder=tmp_path / "spill")
    for i in range(2):
        pool.load(str(i), tmp_path / str(i))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fact_peft.serving.adapter_cache.save_file", full)
        with pytest.raises(ValueError, match=r"spill_folder=.* cannot be written .*No space left"):
            pool.load("2", tmp_path / "2")
    assert pool.names() == ["0", "1"]
    for i in range(2):
        same(pool(images(), [str(i)] * 3)[1], expected[i][1])
    pool.load("2", tmp_path / "2")
    same(pool(images(), ["2"] * 3)[1], expected[2][1])


def test_an_adapter_costs_its_bytes_and_no_module(tmp_path):
    make_adapter(tmp_path)
    vit = make_backbone("vit")
    pool = AdapterPool(vit)
    saved = Adapter.read(tmp_path)
    modules, parameters = len(list(pool.model.module.modules())), len(list(pool.model.module.parameters()))
    for i in range(50):
        pool.load(str(i), saved)
    raw = sum(t.nbytes for group in saved.factors.values() for t in group.values())
    raw += sum(t.nbytes for t in saved.others.values())
    assert pool.stats()["bytes"] == 50 * raw
    assert len(list(pool.model.module.modules())) == modules
    assert len(list(pool.model.module.parameters())) == parameters
    shared = {p.data_ptr() for p in vit.parameters()}
    assert {p.data_ptr() for p in pool.model.module.parameters()} == shared


def num_tensors():
    """How many are alive."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_an_unloaded_adapter_is_gone(tmp_path):
    make_adapter(tmp_path)
    pool = AdapterPool(make_backbone("vit"))
    pool(images(), [None] * 3)
    before = num_tensors()
    pool.load("a", tmp_path)
    pool(images(), ["a"] * 3)
    assert pool.stats()["bytes"] > 0 and num_tensors() > before
    pool.unload("a")
    assert pool.stats()["bytes"] == 0 and num_tensors() == before


# Threads


def test_threads_see_whole_versions_while_adapters_are_replaced_and_moved(tmp_path):
    """Every result is that of one version, while four threads call and two load, with room for two on the device."""
    names, versions = ["a", "b", "c", "d"], 3
    saved, expected = {}, {}
    for i, name in enumerate(names):
        for version in range(versions):
            folder = tmp_path / f"{name}{version}"
            expected[name, version] = make_adapter(
                folder, seed=10 * i + version, rank=version + 1, num_labels=5 + version
            )
            saved[name, version] = Adapter.read(folder)
    pool = AdapterPool(make_backbone("vit"), device_capacity=2, host_capacity=1, spill_folder=tmp_path / "spill")
    for name in names:
        pool.load(name, saved[name, 0])
    problems, stop = [], threading.Event()

    def call(seed):
        choose = random.Random(seed)
        for _ in range(30):
            asked = [choose.choice(names) for _ in range(3)]
            for image, prediction in enumerate(pool(images(), asked)):
                version = len(prediction.logits) - 5
                if not torch.allclose(prediction.logits, expected[prediction.adapter, version][image], atol=1e-5):
                    problems.append((seed, prediction))

    def load(seed):
        choose = random.Random(seed)
        while not stop.is_set():
            key = choose.choice(list(saved))
            pool.load(key[0], saved[key])

    def watched(work, seed):
        try:
            work(seed)
        except Exception as error:
            problems.append(error)

    callers = [threading.Thread(target=watched, args=(call, seed)) for seed in range(4)]
    loaders = [threading.Thread(target=watched, args=(load, seed)) for seed in (100, 101)]
    for thread in callers + loaders:
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    for thread in loaders:
        thread.join()
    assert not problems


# Compilation


def test_other_adapters_do_not_compile_again(tmp_path):
    expected = kinds(tmp_path, "vit")
    pool = AdapterPool(make_backbone("vit"))
    for name in expected:
        pool.load(name, tmp_path / name)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pool.compile(backend=count, fullgraph=True)
    pixels = images()
    same_bucket = [["tt", "tk", "named"], ["named", "tt", None], ["tk"] * 3]  # ranks 3 and 4
    for asked in same_bucket:
        for image, (name, prediction) in enumerate(zip(asked, pool(pixels, asked), strict=True)):
            if name is not None:
                same(prediction, expected[name][image])
        assert len(graphs) == 1
    pool.load("tt", tmp_path / "named")
    same(pool(pixels, ["tt", "tk", "tt"])[2], expected["named"][2])
    pool.load("more", tmp_path / "tk")
    same(pool(pixels, ["more", "tk", "tt"])[0], expected["tk"][0])
    assert len(graphs) == 1


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_pool_agrees_with_adapter_names(decomposition, tmp_path):
    """The two ways to serve a mixed batch share their products, and agree to rounding."""
    torch.manual_seed(0)
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=3, decomposition=decomposition, init_weights=False))
    model.add_adapter("b", FacTConfig(rank=5, decomposition="tt", init_weights=False, scale=2.0))
    pool = AdapterPool(make_backbone("vit"))
    for name in ("default", "b"):
        pool.load(name, (model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)))
    names = ["b", "__base__", "default"]
    with torch.no_grad():
        expected = model.eval()(pixel_values=images(), adapter_names=names).logits
    for image, prediction in enumerate(pool(images(), names)):
        same(prediction, expected[image])


def num_operations(pool, names):
    with torch.profiler.profile() as profile:
        pool(images(count=len(names)), names)
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def test_adapters_of_one_kind_are_stacked_together(tmp_path):
    pool = AdapterPool(make_backbone("vit"))
    for name, rank in {"a": 4, "b": 4, "wider": 5}.items():
        make_adapter(tmp_path / name, rank=rank)
        pool.load(name, tmp_path / name)
    pool(images(), ["a", "b", "wider"])
    assert num_operations(pool, ["a", "b"]) < num_operations(pool, ["a", "wider"])
