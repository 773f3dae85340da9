"""`python -m fact_peft`: merge and export give what the adapted model computes."""

import pytest
import torch
from backbones import image_processor, images, logits, make_backbone
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fact_peft import FacTConfig, save_image_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An adapted classifier, and the folder it is saved in; its base lies beside it."""
    root = tmp_path_factory.mktemp("classifier")
    make_backbone("vit").save_pretrained(root / "base")
    processor = image_processor()
    processor.save_pretrained(root / "base")
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(root / "base")
    model = get_peft_model(base, FacTConfig(rank=3, init_weights=False)).eval()
    save_image_classifier(model, processor, root / "adapter")
    return model, root


def test_merge_saves_a_plain_model(classifier, tmp_path, run_module):
    model, root = classifier
    run_module("fact_peft", "merge", root / "adapter", tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(merged, images()), logits(model, images()), rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 16


@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
@pytest.mark.parametrize("kind", ["classifier", "timm_classifier"])
def test_export_saves_an_onnx_model_for_any_number_of_images(kind, request, tmp_path, run_module):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, root = request.getfixturevalue(kind)
    run_module("fact_peft", "export", root / "adapter", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        pixels = images(count=count)
        found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, logits(model, pixels), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def timm_classifier(tmp_path_factory):
    """As `classifier`, of timm."""
    timm = pytest.importorskip("timm")
    root = tmp_path_factory.mktemp("timm")
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **shape), root / "base", safe_serialization=True)
    base = timm.create_model(f"local-dir:{root / 'base'}", pretrained=True, num_classes=3)
    model = get_peft_model(base, FacTConfig(rank=3, init_weights=False, labels=["cat", "dog", "owl"])).eval()
    data_config = {**timm.data.resolve_input_data_config(base), "mean": (0.1, 0.2, 0.3)}
    save_image_classifier(model, data_config, root / "adapter")
    return model, root


def test_merge_saves_a_plain_timm_model(timm_classifier, tmp_path, run_module):
    model, root = timm_classifier
    run_module("fact_peft", "merge", root / "adapter", tmp_path / "merged")
    timm = pytest.importorskip("timm")
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert merged.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    assert timm.data.resolve_input_data_config(merged)["mean"] == (0.1, 0.2, 0.3)


def test_show_prints_an_adapter_of_timm(timm_classifier, run_module):
    _, root = timm_classifier
    output = run_module("fact_peft", "show", root / "adapter")
    assert str(root / "base") in output and "cat, dog, owl" in output


def test_an_unknown_command_is_refused(run_module):
    with pytest.raises(SystemExit):
        run_module("fact_peft", "melt")
