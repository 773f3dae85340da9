"""The search and the report of the frontier benchmark, and its quick mode: a small ViT on tasks made by rule."""

import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from fact_peft import FacTConfig

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from PIL import Image

from benchmarks.frontier.report import best_within, chosen, frontier
from benchmarks.frontier.search import next_rate
from benchmarks.frontier.tasks import Labelled
from benchmarks.frontier.toy.methods import METHODS, REMEDIES, leading, slices_of
from benchmarks.frontier.toy.tasks import CHANNEL_ORDERS, TASKS, make_task

ROOT = Path(__file__).parents[1]
SIZES = (40, 20, 30)


def random_images(count: int, channels: int, side: int, seed: int, top: int = 256) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(top, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return Labelled(images, torch.randint(10, (count,), generator=generator))


# Dark photographs and fully white digits, so that a pasted pixel is told by its brightness alone.
PHOTOS = random_images(100, 3, 32, seed=0, top=200)
DIGITS = Labelled(torch.full((60, 1, 28, 28), 255, dtype=torch.uint8), torch.zeros(60, dtype=torch.long))
KNOWN = {image.numpy().tobytes() for image in PHOTOS.images}


def originals(images: torch.Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


def test_rotated_images_rotated_back_are_photographs():
    task = make_task("rotation", PHOTOS, DIGITS, DIGITS, SIZES)
    assert set(task.train.labels.tolist()) == {0, 1, 2, 3}
    for image, turns in zip(*task.train, strict=True):
        back = np.rot90(image.numpy(), k=-int(turns), axes=(1, 2))
        assert np.ascontiguousarray(back).tobytes() in KNOWN


def test_channels_put_back_in_order_are_photographs():
    task = make_task("channels", PHOTOS, DIGITS, DIGITS, SIZES)
    assert set(task.train.labels.tolist()) == set(range(6))
    for image, label in zip(*task.train, strict=True):
        assert image[np.argsort(CHANNEL_ORDERS[label])].numpy().tobytes() in KNOWN


@pytest.mark.parametrize("name", ["quadrant", "count"])
def test_pasted_digits_are_where_and_as_many_as_the_label_says(name):
    task = make_task(name, PHOTOS, DIGITS, DIGITS, SIZES)
    assert set(task.train.labels.tolist()) == set(range(TASKS[name][1]))
    for image, label in zip(*task.train, strict=True):
        white = (image == 255).all(0).numpy()
        quadrants = [white[top : top + 16, left : left + 16].sum() for top in (0, 16) for left in (0, 16)]
        if name == "quadrant":
            assert [pixels == 14 * 14 for pixels in quadrants] == [place == label for place in range(4)]
        else:
            assert sorted(quadrants) == [0] * (4 - int(label)) + [14 * 14] * int(label)


def test_mnist_keeps_digits_and_labels():
    digits = random_images(60, 1, 28, seed=1)
    task = make_task("mnist", PHOTOS, digits, digits, SIZES)
    labels = dict(zip(originals(digits.images), digits.labels.tolist(), strict=True))
    for image, label in zip(*task.val, strict=True):
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert labels[image[:1, 2:-2, 2:-2].contiguous().numpy().tobytes()] == label


def test_splits_are_disjoint_and_the_same_at_every_call():
    digits, test_digits = random_images(60, 1, 28, seed=1), random_images(60, 1, 28, seed=2)
    # The margins of a photograph are left alone by `count` only where nothing is pasted, so compare where nothing can
    # change: in `mnist` the digits, in `channels` the photographs whatever the order of their channels.
    for name, key in (("mnist", lambda image: image), ("channels", lambda image: image.sort(dim=0).values)):
        task, again = (make_task(name, PHOTOS, digits, test_digits, SIZES) for _ in range(2))
        splits = [set(originals(torch.stack([key(image) for image in split.images]))) for split in task[:3]]
        assert [len(split) for split in splits] == list(SIZES)
        assert all(not one & other for one, other in itertools.combinations(splits, 2))
        for split, split_again in zip(task[:3], again[:3], strict=True):
            assert torch.equal(split.images, split_again.images) and torch.equal(split.labels, split_again.labels)


def test_too_few_photographs_are_refused():
    with pytest.raises(ValueError, match="need 120 photographs, but there are 100"):
        make_task("rotation", PHOTOS, DIGITS, DIGITS, (40, 20, 60))


def test_frontier_is_what_no_smaller_or_equal_method_beats():
    random.seed(0)
    for _ in range(200):
        points = [(random.randint(0, 5), random.randint(0, 5)) for _ in range(random.randint(1, 8))]
        expected = {
            (size, accuracy)
            for size, accuracy in points
            if not any((s <= size and a > accuracy) or (s < size and a >= accuracy) for s, a in points)
        }
        assert frontier(points) == sorted(expected)
        for budget in range(6):
            within = [accuracy for size, accuracy in expected if size <= budget]
            assert best_within(points, budget) == max(within) if within else np.isnan(best_within(points, budget))


@pytest.mark.parametrize("peak, tried", [(100.0, [1, 4, 16, 64]), (0.01, [1, 4, 0.25]), (1.5, [1, 4, 0.25, 2])])
def test_search_climbs_to_the_peak(peak, tried):
    """The accuracy falls with the distance from the peak, in steps of the search."""
    accuracies: dict[float, float] = {}
    rate = 1.0
    for expected in tried:
        assert rate == expected
        accuracies[rate] = -abs(np.log(rate / peak))
        rate = next_rate(accuracies)


def test_the_learning_rate_is_chosen_on_validation_images_of_the_first_seed():
    def row(rate: float, seed: int, val: float) -> dict[str, object]:
        return {"task": "t", "method": "m", "learning_rate": rate, "seed": seed, "val_accuracy": val}

    runs = pd.DataFrame([row(1.0, 0, 50), row(2.0, 0, 60), row(2.0, 1, 10), row(1.0, 1, 99)])
    assert sorted(chosen(runs)["seed"]) == [0, 1] and set(chosen(runs)["learning_rate"]) == {2.0}


def backbone() -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **shape)).eval()


@pytest.mark.parametrize("name", [*METHODS, *REMEDIES])
def test_a_method_trains_head_and_adapter_and_fact_starts_at_the_backbone(name):
    method = {**METHODS, **REMEDIES}[name]
    train = random_images(100, 3, 32, seed=0)
    model = method.adapt(backbone(), train).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)
    assert all("classifier" in name for name in trained) == (name == "linear probe")
    assert set(method.multipliers) <= {part for part in method.multipliers for name in trained if part in name}
    if name.startswith("FacT"):
        with torch.no_grad():
            features = model.get_base_model().vit(images).last_hidden_state
            expected = backbone().vit(images).last_hidden_state
        # float32, one block
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_slices_of_weights_are_in_the_order_of_the_stack():
    model = get_peft_model(backbone(), FacTConfig(rank=3, init_weights=False)).get_base_model()
    increments = {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    factors = model.factors["64x64"].factors("default")
    expected = torch.einsum("dr,nrs,es->nde", factors["U"], factors["Sigma"], factors["V"])
    # float32 products of three factors
    torch.testing.assert_close(slices_of(model, increments), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_leading_directions_are_those_of_the_svd_of_the_unfolding(axis):
    slices = torch.randn(5, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = leading(slices, 3, axis)
    unfolded = torch.cat(list(slices if axis == 1 else slices.mT), dim=1)
    U = torch.linalg.svd(unfolded).U[:, :3]
    torch.testing.assert_close(basis @ basis.T, U @ U.T)  # float64: the default tolerance


def write_parquet(file: Path, images: Labelled, kind: str) -> None:
    cells = []
    for image in images.images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, kind)
        cells.append({"bytes": buffer.getvalue()})
    pd.DataFrame({"image": cells, "label": images.labels.numpy()}).to_parquet(file)


@pytest.mark.slow
def test_quick_run_measures_each_setting_once(tmp_path):
    for name, images in {
        "cifar10-train": random_images(20, 3, 32, seed=0),
        "cifar10-test": random_images(50, 3, 32, seed=1),
        "mnist-train": random_images(40, 1, 28, seed=2),
        "mnist-test": random_images(20, 1, 28, seed=3),
    }.items():
        write_parquet(tmp_path / f"{name}.parquet", images, "JPEG" if "cifar" in name else "PNG")
    page = tmp_path / "page.md"
    marker = f"python -m benchmarks.frontier.toy --output {tmp_path / 'out'}"
    page.write_text(f"<!-- begin: {marker} -->\n<!-- end: {marker} -->\n")
    command = [sys.executable, "-m", "benchmarks.frontier.toy", "--quick", "--tasks", "count", "--write", str(page)]
    methods = {
        "count.json": ["linear probe", "LoRA r=1", "FacT-TT r=8"],
        "count.remedies.json": ["FacT-TT r=8, V x 16"],
    }
    command += ["--methods", *methods["count.json"], *methods["count.remedies.json"]]
    command += ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--backbone", str(tmp_path / "backbone")]

    def run(*more: str) -> str:
        result = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = run()
    for file, expected in methods.items():
        records = json.loads((tmp_path / "out" / file).read_text())
        settings = [json.dumps(record["setting"]) for record in records]
        assert [record["setting"]["method"] for record in records[::3]] == expected
        assert len(set(settings)) == len(settings) == 3 * len(expected)  # two trials, and the second seed
        assert all(f"| {method} |" in page.read_text() for method in expected)
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "count, LoRA r=1, rate" in first
    again = run()
    assert "rate 0.004, seed 0" in first and "seed 0:" not in again
    default = run("--default_seeds", "2", "--methods", "FacT-TT r=8")
    records = json.loads((tmp_path / "out" / "default" / "count.json").read_text())
    assert len({json.dumps(record["setting"]) for record in records}) == len(records) == 2
    assert {record["setting"]["learning_rate"] for record in records} == {0.8 / 32}
    assert "**A default that is not searched.**" in default and " of 2 |" in default
