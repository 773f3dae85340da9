"""Adapt SAM, the Segment Anything Model, with FacT: box prompts, any dataset with masks.

    python examples/segmentation.py
    python examples/segmentation.py --model facebook/sam-vit-base --dataset imagefolder --data_dir cells

A dataset has a column of images and one of masks (--image_column, --mask_column), in which 0 is background and every
other number one object. Its box is made from the mask; in training it is off by up to a tenth of its sides. Three
ways are compared: the mask decoder trained in full, FacT in the image encoder, and both. For a large model and images
of 1024 pixels begin with smaller steps, which was not tried here: --learning_rate 1e-3 --decoder_learning_rate 1e-4
--batch_size 2.

Without arguments it needs no network and no GPU: it pretrains a tiny SAM on plain shapes, then adapts it to handwritten
digits on photographs, both from scikit-learn; other digits on the other halves of the photographs are held out.
In 190 s of CPU time (torch 2.14, transformers 5.23, peft 0.21; five minutes on two cores that had other work) it
prints

    Pretrained on 5,000 images of plain shapes. Mean Dice on others: 0.890
    Adapting to 40 images. Mean Dice of the objects in 60 held-out images:
                 factors decoder bytes on disk   Dice
    before             0       0             0  0.674
    decoder            0  40,608       176,896  0.717
    FacT           3,328       0        13,656  0.712
    FacT+decoder   3,328  40,608       192,584  0.746
    FacT+decoder, saved in outputs/segmentation/FacT+decoder, then reloaded into a fresh SAM, then merged:
    reloaded: largest difference of logits 0.0e+00, pixels that differ: 0
      merged: largest difference of logits 7.6e-06, pixels that differ: 0

and draws picture.png: held-out images with their boxes, the true masks, and those found before and after.
With --learning_rate 2e-2 --decoder_learning_rate 3e-3, on the same pretrained model, Dice is 0.716, 0.553 and 0.749:
the factors alone do not bear such steps. One seed each.

The output folder then holds each adapter, the merged model for transformers, and sam.pth, the same under the names of
segment_anything, for the tools that open such files. Of a SAM ViT-B the factors alone take 86 KB, and a mask decoder
trained in full 16 MB.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Image, load_dataset
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from PIL import ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging

from fact_peft import FacTConfig

SIZE = 48  # of the images made here, in pixels
METHODS = ("decoder", "FacT", "FacT+decoder")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Model = SamModel | PeftModel
Row = dict[str, Any]  # "image" and "mask", both PIL images
Rows = Sequence[Row] | Dataset


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Hub name or folder of a SamModel. Without: a tiny one."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, folder, or builder such as imagefolder. Without: handwriting."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files for a dataset builder."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    mask_column: str = field(
        default="mask", metadata={"help": "Column of the masks: 0 is background, every other value one object."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "What to train.", "choices": list(METHODS)}
    )
    rank: int = field(default=8, metadata={"help": "Rank of FacT."})
    orthogonal: bool = field(
        default=True, metadata={"help": "Start from orthonormal U and V and zero cores, else as the authors do."}
    )
    scale: float = field(default=4.0, metadata={"help": "Scale of FacT; 32 / rank suits the orthogonal start."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Of the factors of FacT."})
    decoder_learning_rate: float = field(default=1e-3, metadata={"help": "Of the mask decoder."})
    epochs: int = field(default=30, metadata={"help": "Epochs of adaptation."})
    batch_size: int = field(default=4, metadata={"help": "Images per step."})
    boxes_per_image: int = field(default=4, metadata={"help": "Objects of every image per step."})
    max_train: int | None = field(
        default=None, metadata={"help": "Train on at most so many images. Default: all; of the handwriting, 40."}
    )
    max_test: int = field(default=60, metadata={"help": "Use at most so many of the held-out images."})
    num_pictures: int = field(default=6, metadata={"help": "Held-out images to draw."})
    pretraining_images: int = field(default=5000, metadata={"help": "Images of plain shapes, without --model."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    output_dir: str = field(default="outputs/segmentation", metadata={"help": "Where to save what was trained."})


def scene(background: np.ndarray, stamps: list[np.ndarray], rng: np.random.Generator) -> Row:
    """An image with a stamp in each quarter, and its mask.

    Args:
        background: (SIZE, SIZE, 3), from 0 to 255.
        stamps: Four opacities, (SIZE / 2, SIZE / 2), from 0 to 1; what is over a half belongs to the object.
        rng: Chooses the colours.
    """
    image, mask, half = background.astype(float), np.zeros((SIZE, SIZE), dtype="uint8"), SIZE // 2
    for index, opacity in enumerate(stamps):
        top, left = half * (index // 2), half * (index % 2)
        quarter = np.s_[top : top + half, left : left + half]
        colour = (image[quarter].mean((0, 1)) + rng.uniform(60, 196, 3)) % 256  # never close to the background
        image[quarter] += opacity[..., None] * (colour - image[quarter])
        mask[quarter][opacity > 0.5] = index + 1
    return {"image": PILImage.fromarray(image.astype("uint8")), "mask": PILImage.fromarray(mask)}


def plain_shapes(count: int, rng: np.random.Generator) -> list[Row]:
    """Filled ellipses and polygons of one colour on another, with noise."""

    def shape() -> np.ndarray:
        side = SIZE // 2
        drawn = PILImage.new("L", (side, side))
        centre, radii = rng.uniform(0.4, 0.6, 2) * side, rng.uniform(0.15, 0.4, 2) * side
        if rng.random() < 0.5:
            ImageDraw.Draw(drawn).ellipse([*(centre - radii), *(centre + radii)], fill=255)
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.arange(sides := rng.integers(3, 6)) * 2 * np.pi / sides
            corners = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in corners], fill=255)
        return np.asarray(drawn) / 255

    def background() -> np.ndarray:
        return (rng.uniform(0, 256, 3) + rng.normal(0, 10, (SIZE, SIZE, 3))).clip(0, 255)

    return [scene(background(), [shape() for _ in range(4)], rng) for _ in range(count)]


def handwriting(num_train: int, num_test: int, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Handwritten digits on photographs; for testing, other digits on the other halves of the photographs."""
    digits = load_digits().images.astype("float32") / 16
    digits = digits[rng.permutation(len(digits))]
    photos = load_sample_images().images

    def stamp(digit: np.ndarray) -> np.ndarray:
        side = rng.integers(3 * SIZE // 8, SIZE // 2 + 1)
        opacity = np.zeros((SIZE // 2, SIZE // 2))
        top, left = rng.integers(0, SIZE // 2 - side + 1, 2)
        drawn = PILImage.fromarray(digit).resize((side, side), PILImage.Resampling.BICUBIC)
        opacity[top : top + side, left : left + side] = np.asarray(drawn).clip(0, 1)
        return opacity

    def rows(count: int, first_digit: int, half: int) -> list[Row]:
        made = []
        for index in range(count):
            photo = photos[index % len(photos)]
            photo = np.split(photo[:, : photo.shape[1] // 2 * 2], 2, axis=1)[half]
            zoom = rng.integers(1, 4)  # how many pixels of the photograph become one
            top, left = (rng.integers(0, side - zoom * SIZE) for side in photo.shape[:2])
            background = photo[top : top + zoom * SIZE : zoom, left : left + zoom * SIZE : zoom]
            first = first_digit + 4 * index
            made.append(scene(background, [stamp(digit) for digit in digits[first : first + 4]], rng))
        return made

    return rows(num_train, 0, half=0), rows(num_test, 4 * num_train, half=1)


def pretrain(folder: Path, args: Arguments, rng: np.random.Generator) -> None:
    """Train a small SAM from scratch on plain shapes and save it, so that it is loaded like any other."""
    config = SamConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_dim": 256,
            "image_size": SIZE,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [2],
            "output_channels": 32,
            "num_pos_feats": 16,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIZE, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )
    size, longest = {"height": SIZE, "width": SIZE}, {"longest_edge": SIZE}
    processor = SamProcessor(SamImageProcessor(size=longest, pad_size=size, mask_size=longest, mask_pad_size=size))
    model = SamModel(config)
    model.shared_image_embedding.positional_embedding.data.normal_()
    model.to(DEVICE)
    recipe = replace(args, decoder_learning_rate=1e-3)
    train(model, plain_shapes(args.pretraining_images, rng), processor, 1, recipe, "pretraining")
    scores = dice(model, plain_shapes(args.max_test, rng), processor)
    print(
        f"Pretrained on {args.pretraining_images:,} images of plain shapes. Mean Dice on others: {np.mean(scores):.3f}"
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def read_dataset(args: Arguments) -> tuple[Dataset, Dataset]:
    """Rows to train on, and held-out rows, without the images in which nothing is marked.

    Raises:
        ValueError: If a column is missing.
    """
    splits = load_dataset(args.dataset, data_dir=args.data_dir)
    columns = {args.image_column: "image", args.mask_column: "mask"}
    features = splits["train"].features
    missing = [name for name in columns if not isinstance(features.get(name), Image)]
    if missing:
        raise ValueError(
            f"{args.dataset} has no column of images {' and '.join(map(repr, missing))}; it has {features}. Name the "
            "columns with --image_column and --mask_column."
        )
    splits = splits.select_columns(list(columns)).rename_columns(columns).cast_column("image", Image(mode="RGB"))
    splits = splits.filter(lambda row: bool(mask_of(row).any()), desc="looking for masks")
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    if held_out is None:
        parts = splits["train"].train_test_split(0.2, seed=args.seed)
        return parts["train"], parts["test"]
    return splits["train"], held_out.shuffle(seed=args.seed)


def at_most(count: int | None, rows: Rows) -> Rows:
    if count is None or count >= len(rows):
        return rows
    return rows.select(range(count)) if isinstance(rows, Dataset) else rows[:count]


def mask_of(row: Row) -> np.ndarray:
    """The mask of a row, (height, width), int32.

    Raises:
        ValueError: If it has colours, or another size than the image.
    """
    mask = np.asarray(row["mask"])
    if mask.ndim == 3 and (mask[..., :3] == mask[..., :1]).all():  # grey, stored as colours
        mask = mask[..., 0]
    if mask.shape != row["image"].size[::-1]:
        raise ValueError(
            f"A mask is {mask.shape}, its image {row['image'].size[::-1]} (height, width). A mask needs the size of "
            "its image and one channel: 0 for the background and another number for every object; convert masks that "
            "show objects in colours."
        )
    return mask.astype("int32")


def objects(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the objects of a mask, (N,), and their boxes (left, top, right, bottom), (N, 4), in pixels."""
    numbers = np.unique(mask[mask != 0])
    places = [np.nonzero(mask == number) for number in numbers]
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places]
    return numbers, np.array(boxes, dtype=float)


class Batches:
    """Makes a batch of images, each with as many boxes, and the true masks of what is in them.

    Args:
        processor: The model's, which scales images, boxes and masks.
        boxes_per_image: Objects drawn from every image; from an image with fewer, some more than once.
    """

    def __init__(self, processor: SamProcessor, boxes_per_image: int) -> None:
        self.processor = processor
        self.boxes_per_image = boxes_per_image

    def __call__(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, and the masks at the size of its output, (images, boxes, height, width)."""
        masks, numbers, boxes = [mask_of(row) for row in rows], [], []
        for mask in masks:
            found, places = objects(mask)
            order = torch.randperm(len(found)).repeat(-(-self.boxes_per_image // len(found)))
            chosen = order[: self.boxes_per_image].numpy()
            numbers.append(found[chosen])
            # Off by up to a tenth of their sides, since nobody draws them exactly.
            sides = np.tile(places[chosen, 2:] - places[chosen, :2], 2)
            boxes.append(places[chosen] + sides * (torch.rand(sides.shape).numpy() - 0.5) / 5)
        inputs = self.processor(
            images=[row["image"] for row in rows],
            segmentation_maps=masks,
            input_boxes=[box.tolist() for box in boxes],
            return_tensors="pt",
        )
        truth = inputs["labels"][:, None] == torch.as_tensor(np.stack(numbers))[:, :, None, None]
        return {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"].float()}, truth.float()


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus 1 - Dice of the probabilities, mean over objects; both (B, N, height, width)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum((-2, -1)) + 1
    soft_dice = overlap / (probability.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + (1 - soft_dice).mean()


def train(model: Model, rows: Rows, processor: SamProcessor, epochs: int, args: Arguments, title: str) -> None:
    """AdamW on whatever is trainable, with linear warm-up over a tenth of the steps and cosine decay."""
    batches = DataLoader(rows, args.batch_size, shuffle=True, collate_fn=Batches(processor, args.boxes_per_image))
    factors = [p for name, p in model.named_parameters() if p.requires_grad and ".factors." in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".factors." not in name]
    groups = [{"params": factors, "lr": args.learning_rate}, {"params": others, "lr": args.decoder_learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    num_steps = epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    model.train()
    with tqdm(total=num_steps, desc=title, leave=False) as progress:
        for _ in range(epochs):
            for inputs, truth in batches:
                inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
                loss = loss_of(model(**inputs, multimask_output=False).pred_masks[:, :, 0], truth.to(DEVICE))
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def predict(model: Model, row: Row, processor: SamProcessor) -> Tensor:
    """Logits (N, height, width) of the masks that the model finds in the box of each object; positive is inside."""
    _, boxes = objects(mask_of(row))
    model.eval()
    inputs = processor(images=row["image"], input_boxes=[boxes.tolist()], return_tensors="pt")
    embeddings = model.get_image_embeddings(inputs["pixel_values"].to(DEVICE))
    logits = [
        model(image_embeddings=embeddings, input_boxes=some.to(DEVICE), multimask_output=False).pred_masks.cpu()
        for some in inputs["input_boxes"].float().split(64, dim=1)
    ]
    (masks,) = processor.image_processor.post_process_masks(
        torch.cat(logits, dim=1), inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    return masks[:, 0]


def truth_of(row: Row) -> Tensor:
    """True masks (N, height, width) of the objects, in the order of `predict`."""
    mask = mask_of(row)
    return torch.as_tensor(mask == objects(mask)[0][:, None, None])


def dice(model: Model, rows: Rows, processor: SamProcessor) -> list[float]:
    """Dice of every object of all rows, 2 |A and B| / (|A| + |B|): 1 if prediction A and truth B are the same."""
    scores = []
    for row in tqdm(rows, "testing", leave=False):
        found, truth = predict(model, row, processor) > 0, truth_of(row)
        scores += (2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))).tolist()
    return scores


def adapt(sam: SamModel, method: str, args: Arguments) -> Model:
    """A copy of the model in which what the method trains is trainable."""
    model = copy.deepcopy(sam)
    if method == "decoder":
        model.requires_grad_(False)
        model.mask_decoder.requires_grad_(True)
        return model
    # The transformer blocks of the vision encoder are found by structure; the mask decoder is trained in full.
    heads = ["mask_decoder"] if method == "FacT+decoder" else []
    start = "orthogonal" if args.orthogonal else True
    config = FacTConfig(rank=args.rank, scale=args.scale, init_weights=start, modules_to_save=heads)
    return get_peft_model(model, config)


def save(model: Model, folder: Path) -> int:
    """Save what was trained and nothing else; returns the bytes of its safetensors."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(folder, **({} if isinstance(model, PeftModel) else {"state_dict": trained}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compare(
    sam: SamModel, rows: Rows, held_out: Rows, processor: SamProcessor, args: Arguments, folder: Path
) -> dict[str, Model]:
    """Print one row per method; returns the models, saved below `folder`."""
    before = f"{np.mean(dice(sam, held_out, processor)):.3f}"
    models, table = {}, {"before": {"factors": "0", "decoder": "0", "bytes on disk": "0", "Dice": before}}
    for method in tqdm(args.methods, "methods", leave=False):
        set_seed(args.seed)
        models[method] = adapt(sam, method, args)
        train(models[method], rows, processor, args.epochs, args, method)
        sizes = [(name, p.numel()) for name, p in models[method].named_parameters() if p.requires_grad]
        table[method] = {
            "factors": f"{sum(size for name, size in sizes if 'factors.' in name):,}",
            "decoder": f"{sum(size for name, size in sizes if 'mask_decoder.' in name):,}",
            "bytes on disk": f"{save(models[method], folder / method):,}",
            "Dice": f"{np.mean(dice(models[method], held_out, processor)):.3f}",
        }
    print(pd.DataFrame.from_dict(table, orient="index").to_string())
    return models


def show_agreement(trained: PeftModel, sam: SamModel, rows: Rows, processor: SamProcessor, folder: Path) -> SamModel:
    """Reload a saved adapter into a fresh model and merge it: the masks must stay what they were."""
    expected = [predict(trained, row, processor) for row in rows]
    model = PeftModel.from_pretrained(copy.deepcopy(sam), folder)
    for state in ("reloaded", "merged"):
        model = model.merge_and_unload() if state == "merged" else model
        found = [predict(model, row, processor) for row in rows]
        pairs = list(zip(found, expected, strict=True))
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        pixels = sum(((ours > 0) != (theirs > 0)).sum().item() for ours, theirs in pairs)
        print(f"{state:>8}: largest difference of logits {difference:.1e}, pixels that differ: {pixels}")
    return model


# What transformers calls the parts of a SAM, and segment_anything; in this order.
SEGMENT_ANYTHING = {
    r"^shared_image_embedding\.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    r"^vision_encoder\.layers": "image_encoder.blocks",
    r"^vision_encoder": "image_encoder",
    r"patch_embed\.projection": "patch_embed.proj",
    r"neck\.conv1": "neck.0",
    r"neck\.layer_norm1": "neck.1",
    r"neck\.conv2": "neck.2",
    r"neck\.layer_norm2": "neck.3",
    r"mask_embed\.conv1": "mask_downscaling.0",
    r"mask_embed\.layer_norm1": "mask_downscaling.1",
    r"mask_embed\.conv2": "mask_downscaling.3",
    r"mask_embed\.layer_norm2": "mask_downscaling.4",
    r"mask_embed\.conv3": "mask_downscaling.6",
    r"^prompt_encoder\.point_embed": "prompt_encoder.point_embeddings",
    r"upscale_conv1": "output_upscaling.0",
    r"upscale_layer_norm": "output_upscaling.1",
    r"upscale_conv2": "output_upscaling.3",
    r"(mlps\.\d|iou_prediction_head)\.layers\.0": r"\1.layers.1",
    r"(mlps\.\d|iou_prediction_head)\.proj_in": r"\1.layers.0",
    r"(mlps\.\d|iou_prediction_head)\.proj_out": r"\1.layers.2",
    r"layer_norm": "norm",
}


def segment_anything_weights(sam: SamModel) -> dict[str, Tensor]:
    """The weights of a SAM under the names of the package segment_anything, in which most tools want them."""
    renamed = {}
    for name, weight in sam.state_dict().items():
        for pattern, replacement in SEGMENT_ANYTHING.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight.cpu()
    # transformers lists the position embedding a second time, as part of the prompt encoder.
    renamed.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    return renamed


def overlay(image: PILImage.Image, masks: Tensor) -> np.ndarray:
    """The image in grey, and each mask on it in a colour of its own."""
    drawn = np.asarray(image.convert("L").convert("RGB")) / 255 * 0.6
    for index, mask in enumerate(masks.numpy()):
        drawn[mask] = 0.25 * drawn[mask] + 0.75 * np.array(colormaps["tab10"](index % 10)[:3])
    return drawn


def draw(models: dict[str, Model], rows: Rows, processor: SamProcessor, file: Path) -> None:
    """Held-out images with their boxes, their true masks, and those that each model finds, with the mean Dice."""
    figure = Figure(figsize=(1.9 * len(rows), 2.0 * (2 + len(models))), layout="constrained")
    grid = figure.subplots(2 + len(models), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        grid[0, column].imshow(row["image"])
        for index, (left, top, right, bottom) in enumerate(objects(mask_of(row))[1]):
            corner, colour = (left - 0.5, top - 0.5), colormaps["tab10"](index % 10)
            box = Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour)
            grid[0, column].add_patch(box)
        grid[1, column].imshow(overlay(row["image"], truth_of(row)))
        for line, model in enumerate(models.values(), start=2):
            grid[line, column].imshow(overlay(row["image"], predict(model, row, processor) > 0))
            grid[line, column].set_xlabel(f"Dice {np.mean(dice(model, [row], processor)):.2f}")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[:, 0], ("image and boxes", "truth", *models), strict=True):
        axes.set_ylabel(title)
    figure.savefig(file, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if (args.model is None) != (args.dataset is None):
        raise SystemExit("--model and --dataset go together: pass both, or neither for handwriting on photographs.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    folder = Path(args.output_dir)
    if args.model is None:
        torch.set_num_threads(1)  # more do not speed up a model this small, and slow it down on a busy machine
        rng = np.random.default_rng(args.seed)
        args.model = str(folder / "sam")
        pretrain(Path(args.model), args, rng)
        rows, held_out = handwriting(args.max_train or 40, args.max_test, rng)
    else:
        rows, held_out = read_dataset(args)
    rows, held_out = at_most(args.max_train, rows), at_most(args.max_test, held_out)
    sam = SamModel.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    processor = SamProcessor.from_pretrained(args.model)

    print(f"Adapting to {len(rows)} images. Mean Dice of the objects in {len(held_out)} held-out images:")
    models = compare(sam, rows, held_out, processor, args, folder)
    last = args.methods[-1]
    drawn = [held_out[index] for index in range(min(args.num_pictures, len(held_out)))]
    draw({"before": sam, last: models[last]}, drawn, processor, folder / "picture.png")
    if last != "decoder":
        print(f"{last}, saved in {folder / last}, then reloaded into a fresh SAM, then merged:")
        merged = show_agreement(models[last], sam, drawn, processor, folder / last)
        merged.save_pretrained(folder / "merged")
        processor.save_pretrained(folder / "merged")
        torch.save(segment_anything_weights(merged), folder / "sam.pth")
        print(f"The merged SAM is {folder / 'merged'} for transformers and {folder / 'sam.pth'} for segment_anything.")


if __name__ == "__main__":
    main()
