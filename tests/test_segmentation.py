"""SAM with FacT: the example, what it writes for other tools, and segment_anything's own model."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import SamModel, SamProcessor

from fact_peft import FacTConfig, FacTLinear

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("segment_anything")
pytest.importorskip("sklearn")

from PIL import Image
from sam.data import Batches, at_most, mask_of, objects, read_dataset
from sam.handwriting import handwriting
from sam.masks import predict
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from examples import segmentation as script

QUICK = ("--pretraining_images", "4", "--max_train", "4", "--max_test", "2", "--epochs", "1", "--batch_size", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run leaves behind, and what it printed. It has learnt nothing."""
    folder = tmp_path_factory.mktemp("segmentation")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(script, "print", lambda *words: printed.append(" ".join(map(str, words))), raising=False)
        patch.setattr("sys.argv", ["segmentation.py", *QUICK, "--output_dir", str(folder)])
        script.main()
    return folder, "\n".join(printed)


def test_it_prints_dice_and_bytes_and_draws(finished):
    folder, printed = finished
    for method in script.METHODS:
        (line,) = (line.split() for line in printed.splitlines() if line.startswith(f"{method} "))
        files = [*(folder / method).glob("*.safetensors")]
        assert int(line[-2].replace(",", "")) == sum(file.stat().st_size for file in files) > 0
        assert 0 <= float(line[-1]) <= 1
    assert "reloaded: largest difference of logits 0.0e+00, pixels that differ: 0" in printed
    with Image.open(folder / "picture.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 1000


def test_the_adapter_holds_factors_and_mask_decoder(finished):
    folder, _ = finished
    model = PeftModel.from_pretrained(SamModel.from_pretrained(folder / "sam"), folder / "FacT+decoder")
    adapted = [name for name, module in model.get_base_model().named_modules() if isinstance(module, FacTLinear)]
    assert len(adapted) == 3 * 4 and all(name.startswith("vision_encoder.layers.") for name in adapted)
    assert (folder / "FacT" / "adapter_model.safetensors").stat().st_size < 40_000


def segment_anything_sam(config):
    """segment_anything's model in the sizes of a config of transformers."""
    vision, heads = config.vision_config, config.mask_decoder_config
    grid = vision.image_size // vision.patch_size
    return Sam(
        ImageEncoderViT(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.mlp_dim / vision.hidden_size,
            out_chans=vision.output_channels,
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=vision.global_attn_indexes,
        ),
        PromptEncoder(
            embed_dim=heads.hidden_size,
            image_embedding_size=(grid, grid),
            input_image_size=(vision.image_size, vision.image_size),
            mask_in_chans=config.prompt_encoder_config.mask_input_channels,
        ),
        MaskDecoder(
            transformer_dim=heads.hidden_size,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=heads.hidden_size, mlp_dim=heads.mlp_dim, num_heads=heads.num_attention_heads
            ),
            iou_head_hidden_dim=heads.iou_head_hidden_dim,
        ),
    ).eval()


def test_the_merged_model_computes_the_same_in_segment_anything(finished):
    folder, _ = finished
    merged, processor = SamModel.from_pretrained(folder / "merged"), SamProcessor.from_pretrained(folder / "merged")
    sam = segment_anything_sam(merged.config)
    sam.load_state_dict(torch.load(folder / "sam.pth", weights_only=True))
    _, held_out = handwriting(0, 1, np.random.default_rng(0))
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(held_out[0]["image"]))
    _, boxes = objects(mask_of(held_out[0]))
    theirs = [predictor.predict(box=box, multimask_output=False, return_logits=True)[0] for box in boxes]
    ours = predict(merged, held_out[0], processor)
    assert ours.std() > 1e-4  # small, since nothing has been learnt, but not constant
    torch.testing.assert_close(ours, torch.from_numpy(np.concatenate(theirs)), rtol=1e-4, atol=1e-5)


def test_segment_anythings_own_model_is_adapted_saved_and_merged(finished, tmp_path):
    folder, _ = finished
    torch.manual_seed(0)
    plain = segment_anything_sam(SamModel.from_pretrained(folder / "sam").config)
    config = FacTConfig(rank=4, exclude_modules=r"mask_decoder\..*", modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(plain), config)
    adapted = [name for name, module in model.get_base_model().named_modules() if isinstance(module, FacTLinear)]
    assert len(adapted) == 3 * 4 and all(name.startswith("image_encoder.blocks.") for name in adapted)

    pixels, box = torch.randn(1, 3, 48, 48), torch.tensor([[8.0, 8.0, 40.0, 48.0]])

    def logits(sam):  # Sam.forward itself computes no gradients
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        prompts = {"sparse_prompt_embeddings": sparse, "dense_prompt_embeddings": dense}
        place = sam.prompt_encoder.get_dense_pe()
        return sam.mask_decoder(sam.image_encoder(pixels), image_pe=place, multimask_output=False, **prompts)[0]

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):  # in the first, V = 0 lets no gradient to the other factors
        logits(model).square().sum().backward()
        optimizer.step()
    moved = {name for name, parameter in trained.items() if not torch.equal(parameter, before[name])}
    assert {name for name in trained if "factors." in name} <= moved
    assert any("mask_decoder.modules_to_save" in name for name in moved)

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logits(model)
        reloaded = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=0)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    fresh = segment_anything_sam(SamModel.from_pretrained(folder / "sam").config)
    fresh.load_state_dict(merged.state_dict())  # strict: the names are those of segment_anything


def image_and_mask(seed):
    """An image of 30 x 40 pixels, and a mask with objects 3 and 200."""
    mask = np.zeros((30, 40), dtype="uint8")
    mask[5:9, 10:20], mask[15:25, 2:8] = 3, 200
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype="uint8")
    return Image.fromarray(pixels), Image.fromarray(mask)


def test_boxes_are_tight_around_the_objects():
    image, mask = image_and_mask(0)
    numbers, boxes = objects(mask_of({"image": image, "mask": mask}))
    assert numbers.tolist() == [3, 200]
    assert boxes.tolist() == [[10, 5, 20, 9], [2, 15, 8, 25]]


def test_a_mask_of_colours_or_of_another_size_is_refused():
    image, mask = image_and_mask(0)
    assert mask_of({"image": image, "mask": mask.convert("RGB")}).max() == 200  # grey
    with pytest.raises(ValueError, match=r"A mask is \(30, 40, 3\), its image \(30, 40\)"):
        mask_of({"image": image, "mask": image})
    with pytest.raises(ValueError, match=r"A mask is \(30, 39\)"):
        mask_of({"image": image, "mask": mask.crop((0, 0, 39, 30))})


def test_the_masks_of_a_batch_are_those_of_its_boxes(finished):
    folder, _ = finished
    torch.manual_seed(0)
    image, mask = image_and_mask(0)
    batches = Batches(SamProcessor.from_pretrained(folder / "sam"), boxes_per_image=5)
    inputs, truth = batches([{"image": image, "mask": mask}] * 3)
    assert inputs["input_boxes"].shape == (3, 5, 4) and truth.shape == (3, 5, 48, 48)
    for boxes, masks in zip(inputs["input_boxes"], truth, strict=True):
        for (left, top, right, bottom), one in zip(boxes, masks, strict=True):
            y, x = one.nonzero(as_tuple=True)
            slack = 2.5  # the box is off by a tenth of at most 16 pixels, and pixels are rounded
            assert abs(x.min() - left) < slack and abs(x.max() + 1 - right) < slack
            assert abs(y.min() - top) < slack and abs(y.max() + 1 - bottom) < slack


def test_a_folder_with_masks_is_read_without_the_images_that_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = []
    for index in range(6):
        image, mask = image_and_mask(index)
        if index == 5:
            mask = mask.point(lambda value: 0)
        for name, picture in (("image", image), ("mask", mask)):
            picture.save(tmp_path / f"{name}{index}.png")
        lines.append(json.dumps({"image_file_name": f"image{index}.png", "mask_file_name": f"mask{index}.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    rows, held_out = read_dataset("imagefolder", str(tmp_path))
    assert (len(rows), len(held_out)) == (4, 1)
    assert objects(mask_of(rows[0]))[0].tolist() == [3, 200]
    assert len(at_most(2, rows)) == 2
    with pytest.raises(ValueError, match="no column of images 'label'"):
        read_dataset("imagefolder", str(tmp_path), mask_column="label")


def test_16_bit_images_reach_the_model_as_their_8_bit_copies_do(finished):
    folder, _ = finished
    _, mask = image_and_mask(0)
    grey = np.random.default_rng(0).integers(0, 256, (30, 40))
    deep, shallow = Image.fromarray((grey * 257).astype("uint16")), Image.fromarray(grey.astype("uint8"))
    batches = Batches(SamProcessor.from_pretrained(folder / "sam"), boxes_per_image=1)
    inputs, _ = batches([{"image": deep, "mask": mask}, {"image": shallow, "mask": mask}])
    assert torch.equal(*inputs["pixel_values"]) and inputs["pixel_values"].std() > 0.1


@pytest.mark.slow
def test_the_default_run_gets_better(tmp_path, run_module):
    output = run_module("examples.segmentation", "--methods", "FacT+decoder", "--output_dir", tmp_path)
    scores = {line.split()[0]: float(line.split()[-1]) for line in output.splitlines() if line.strip()[-4:-3] == "."}
    assert scores["FacT+decoder"] > scores["before"] + 0.03
