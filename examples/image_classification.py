"""Fine-tune an image classifier with FacT: transformers' Trainer, any model, any dataset, one GPU or many.

    python examples/image_classification.py
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset AI-Lab-Makerere/beans
    python examples/image_classification.py --model M --dataset imagefolder --data_dir photos --scales 0.01 0.1 1 10 100
    python examples/image_classification.py --model M --dataset parquet --data_files train=a.parquet test=b.parquet
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/image_classification.py --model M --dataset D

The defaults are the paper's recipe (AdamW at 1e-3, weight decay 1e-4, batches of 64 per device, 100 epochs, cosine
decay after 10 epochs of warm-up, dropout 0.1 on the factors, drop-path 0.1 where the model has it). Every option of
transformers' TrainingArguments works: --bf16, --gradient_checkpointing, --report_to tensorboard, --push_to_hub ...

With --storage int8 (or int4 --straight_through 10) factors and head are saved in 8 (4) bits, see docs/bytes.md.

The checkpoint with the best validation accuracy is kept; the test split, if there is one, is looked at once, at the
end. The output folder then holds the adapter with head, labels and image processor, which
``fact_peft.load_image_classifier`` loads in one call, a model card, and picture.png: the curves, and where the adapter
acts. A run that was interrupted, at whatever point, goes on from its last whole checkpoint when it is started again.

Without arguments it adapts a small ViT, pretrained on upright handwritten digits, to inverted and rotated ones. In 50
to 75 s on two CPU cores (torch 2.15, transformers 5.23, peft 0.21) it prints, after the log of every epoch,

    scale 1: validation accuracy 83.8 %
    test accuracy 87.1 %
    saved in outputs/image_classification: README.md, adapter_config.json, adapter_model.safetensors, picture.png, ...

and with --scales 0.1 1 10 100 it finds 63.7, 83.8, 90.0 and 91.2 % on the validation images (80, so a difference of one
point is one image), and 88.1 % on the test images for scale 100; with --orthogonal --scales 1 4 10 40 three times 88.8
and 92.5 %, and 88.7 %.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from fact_peft.storage.replacing import replace_files
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)
from transformers.utils import logging

from fact_peft import (
    Adapter,
    FacTConfig,
    StraightThroughCallback,
    load_image_classifier,
    push_image_classifier,
    quantize_adapter,
)
from fact_peft.operations.inspection import plot_increments
from fact_peft.sharing.card import copy_model_card, write_model_card

COMPLETE = "complete.json"  # written into a checkpoint last
# What a run's result depends on, with the data, the arguments below and the global batch size.
RECIPE_FIELDS = (
    *("num_train_epochs", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps"),
    *("bf16", "fp16", "seed"),
)
Setting = dict[str, Any]


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Hub name or folder. Without: a ViT made here."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, folder, or builder such as imagefolder or parquet. Without: digits."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files for a dataset builder."})
    data_files: list[str] | None = field(default=None, metadata={"help": "Its files, as split=path."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the one column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the one column of class labels."})
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training images to validate on if there is no validation split."}
    )
    corrupt_images: str = field(
        default="stop", metadata={"help": "What to do if some images cannot be read.", "choices": ["stop", "skip"]}
    )
    rank: int = field(default=8, metadata={"help": "Rank of FacT."})
    decomposition: str = field(default="tt", metadata={"help": "'tt' or 'tk'."})
    scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Scales to try; the best on the validation images is kept."}
    )
    orthogonal: bool = field(
        default=False,
        metadata={"help": "Start from orthonormal U and V and zero cores; meant for scales around 32 / rank."},
    )
    fact_dropout: float = field(default=0.1, metadata={"help": "Dropout on the factors."})
    storage: str | None = field(
        default=None, metadata={"help": "Save factors in float16, bfloat16, int8, int4 or int2; tested so too."}
    )
    head_storage: str | None = field(
        default=None, metadata={"help": "The same for the head. Default: as --storage, but in no less than int8."}
    )
    straight_through: float | None = field(
        default=None, metadata={"help": "Train so many of the last epochs with rounded numbers; for int4 and int2."}
    )
    drop_path: float = field(default=0.1, metadata={"help": "Rate of dropped residual branches, where supported."})


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with the paper's recipe as defaults."""

    output_dir: str = "outputs/image_classification"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    num_train_epochs: float = 100
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1  # of all steps
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    save_total_limit: int = 2  # the best and the last
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "accuracy"
    max_grad_norm: float = 1e9  # no clipping; a number, since DeepSpeed takes 0 for 1 and wants that of its own file
    remove_unused_columns: bool = False
    label_names: list[str] = field(default_factory=lambda: ["labels"])
    disable_tqdm: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()


def upright_and_shifted_digits() -> tuple[Dataset, DatasetDict]:
    """900 digits to pretrain on; others inverted and rotated by 90 degrees, 40 a class to train and validate on."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8) * 15).astype("uint8")
    order = np.random.default_rng(0).permutation(len(labels))

    def dataset(rows: np.ndarray, images: np.ndarray) -> Dataset:
        columns = {"image": [PILImage.fromarray(image) for image in images[rows]], "label": labels[rows]}
        return Dataset.from_dict(columns, Features(image=Image(), label=ClassLabel(names=[*map(str, range(10))])))

    shifted = np.ascontiguousarray(np.rot90(255 - pixels, axes=(1, 2)))
    few = np.concatenate([order[900:][labels[order[900:]] == digit][:40] for digit in range(10)])
    test = np.setdiff1d(order[900:], few)
    return dataset(order[:900], pixels), DatasetDict(train=dataset(few, shifted), test=dataset(test, shifted))


def pretrain(folder: Path, upright: Dataset) -> None:
    """Train a small ViT from scratch and save it, without its head, and its image processor; unless this was done."""
    if folder.exists():
        return
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "intermediate_size": 256, "hidden_act": "relu"}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_attention_heads=4, num_labels=10, **shape))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    recipe = Recipe(
        str(folder.parent),
        num_train_epochs=25,
        per_device_train_batch_size=25,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_strategy="no",
    )
    images = prepared(upright, "image", "label", processor)
    trainer = Trainer(model, recipe, data_collator=collate, train_dataset=images)
    trainer.train()
    if trainer.is_world_process_zero():
        part = folder.with_suffix(".part")
        model.vit.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(folder)
    recipe.distributed_state.wait_for_everyone()


def read_splits(args: Arguments) -> DatasetDict:
    """Splits train, validation and, if there is one, test.

    Raises:
        ValueError: If there is no train split.
    """
    assert args.dataset is not None
    files = dict(file.split("=", 1) for file in args.data_files) if args.data_files else None
    splits = load_dataset(args.dataset, data_dir=args.data_dir, data_files=files)
    if "train" not in splits:
        raise ValueError(f"--dataset {args.dataset} has no split 'train' but {', '.join(splits)}.")
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def find_columns(args: Arguments, features: Features) -> tuple[str, str]:
    """Names of the columns of images and of labels.

    Raises:
        ValueError: If a named column does not exist, or none was named and there is not exactly one candidate.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features]
    columns = []
    for option, given, candidates in (
        ("image_column", args.image_column, images),
        ("label_column", args.label_column, labels),
    ):
        candidates = [name for name in features if name == given] if given else candidates
        if len(candidates) != 1:
            raise ValueError(
                f"--{option} {given or 'was not given'}: {args.dataset} has {len(candidates)} such columns"
                f"{': ' + ', '.join(candidates) if candidates else ''}. Its columns are {dict(features)}; name one of "
                f"them with --{option}."
            )
        columns += candidates
    return columns[0], columns[1]


def class_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes: as the dataset has them, else the values that its training labels take."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = train.unique(column)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    return [str(label) for label in range(max(value for value in values if value is not None) + 1)]


def with_checked_labels(split: str, dataset: Dataset, column: str, names: list[str]) -> Dataset:
    """The dataset with its labels as indices into `names`.

    Raises:
        ValueError: If there are others.
    """
    labels = dataset[column][:]
    known = set(names) if isinstance(labels[0], str) else set(range(len(names)))
    wrong = [(row, label) for row, label in enumerate(labels) if label not in known]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(labels)} labels of split {split!r} are none of the {len(names)} classes of the head "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); the first is {wrong[0][1]!r} in row "
            f"{wrong[0][0]}. Mend or leave out these rows; a test split without labels cannot be used."
        )
    return dataset.cast_column(column, ClassLabel(names=names))


def readable(split: str, dataset: Dataset, column: str, choice: str) -> Dataset:
    """The dataset without the images that cannot be decoded, which are counted and named.

    Raises:
        ValueError: If there are any and `choice` is ``"stop"``.
    """

    def reason(image: dict[str, Any]) -> str:
        try:
            with PILImage.open(BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
                opened.load()
        except Exception as error:  # whatever a decoder may raise on damaged bytes
            return f"{image['path'] or 'image'}: {error}"
        return ""

    encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    checked = encoded.map(
        lambda row: {"reason": reason(row[column])}, remove_columns=[column], desc=f"checking {split}"
    )
    corrupt = {row: reason for row, reason in enumerate(checked["reason"]) if reason}
    if not corrupt:
        return dataset
    listing = "\n  ".join(f"row {row}, {reason}" for row, reason in list(corrupt.items())[:20])
    message = f"{len(corrupt)} of {len(dataset)} images of split {split!r} cannot be read:\n  {listing}"
    if choice == "stop" or len(corrupt) == len(dataset):
        raise ValueError(f"{message}\nRepair or remove them, or train on the others with --corrupt_images skip.")
    logging.get_logger("transformers").warning("%s\nThey are skipped.", message)
    return dataset.select([row for row in range(len(dataset)) if row not in corrupt])


def prepared(dataset: Dataset, image_column: str, label_column: str, processor: BaseImageProcessor) -> Dataset:
    """Rows of pixel_values and labels, processed when they are read."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = processor(batch["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    columns = {image_column: "image", label_column: "labels"}
    dataset = dataset.select_columns(list(columns)).rename_columns(columns)
    return dataset.cast_column("image", Image(mode="RGB")).with_transform(transform)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def make_model(args: Arguments, scale: float, labels: list[str], seed: int) -> PeftModel:
    """The backbone with a fresh head for `labels`, adapted with FacT."""
    config = AutoConfig.from_pretrained(args.model)
    drop_path = {"drop_path_rate": args.drop_path} if hasattr(config, "drop_path_rate") else {}
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,  # mixed precision is autocast's work
        **drop_path,
    )
    config = FacTConfig(
        rank=args.rank,
        decomposition=args.decomposition,
        scale=scale,
        init_weights="orthogonal" if args.orthogonal else True,
        fact_dropout=args.fact_dropout,
    )
    set_seed(seed)  # the factors start equal on all ranks, whatever the launcher did to load the backbone
    # Under ZeRO-3 with bf16 the head is bfloat16 by now, and DeepSpeed wants factors and head in one type.
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False)
    # accelerate 1.15 makes the patch embedding an FSDP2 unit of its own, which cannot lie inside another one.
    model._no_split_modules = [name for name in model._no_split_modules or [] if not name.endswith("Embeddings")]
    return model


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once everything is in it, and says which run wrote it.

    Args:
        setting: What the run's results depend on.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when all processes have written their part."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
            part = folder / f"{COMPLETE}.part"
            part.write_text(json.dumps({"setting": self.setting, "files": files}, indent=1))
            part.replace(folder / COMPLETE)

    def last(self, output_dir: str) -> str | None:
        """The newest whole checkpoint below `output_dir`; half-written ones are passed over.

        Raises:
            ValueError: If it was written by a run with another setting.
        """
        for folder in sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
            if not (folder / COMPLETE).exists():
                continue
            record = json.loads((folder / COMPLETE).read_text())
            if any(
                not (folder / name).exists() or (folder / name).stat().st_size != size
                for name, size in record["files"].items()
            ):
                continue
            theirs = record["setting"]
            differing = [
                f"{name}: {theirs.get(name)} there, {value} here"
                for name, value in self.setting.items()
                if theirs.get(name) != value
            ]
            if differing:
                raise ValueError(
                    f"{folder} belongs to another run ({'; '.join(differing)}). Give this run an --output_dir of its "
                    "own, remove the folder, or use the settings it was started with."
                )
            return str(folder)
        return None


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def fit(args: Arguments, training: Recipe, scale: float, labels: list[str], data: DatasetDict) -> Trainer:
    """Train with one scale, or go on with it; the model is then the one of the best epoch."""
    setting = {
        **{name: value for name, value in asdict(args).items() if name != "scales"},
        "scale": scale,
        "labels": labels,
        "num_training_images": len(data["train"]),
        "global_batch_size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        **{name: getattr(training, name) for name in RECIPE_FIELDS},
    }
    checkpoints = WholeCheckpoints(json.loads(json.dumps(setting)))
    resume_from = checkpoints.last(training.output_dir)
    set_seed(training.seed)
    callbacks: list[TrainerCallback] = [checkpoints]
    if args.storage and args.straight_through:
        callbacks.append(StraightThroughCallback(args.storage, args.head_storage, args.straight_through))
    trainer = Trainer(
        make_model(args, scale, labels, training.seed),
        training,
        data_collator=collate,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def store_in(trainer: Trainer, storage: str, head_storage: str | None) -> None:
    """Have the adapter be saved in few bits, and be tested as it will be, unless processes hold parts of it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        config = trainer.model.peft_config["default"]
        config.storage, config.head_storage = storage, head_storage
    else:
        quantize_adapter(trainer.model, storage, head_storage)


def draw(trainer: Trainer, folder: Path) -> None:
    """Loss and accuracy by epoch, and the map of the adapter's increments, as picture.png."""
    history = trainer.state.log_history
    figure = Figure(figsize=(15, 5), layout="constrained")
    losses, accuracies, increments = figure.subplots(1, 3)
    for axes, key, name in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        (accuracies, "eval_accuracy", "validation"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), label=name)
    for axes, title in ((losses, "loss"), (accuracies, "accuracy")):
        axes.set(xlabel="epoch", title=title)
        axes.legend()
    plot_increments(Adapter.read(folder).increment_norms(), increments)
    figure.savefig(folder / "picture.png", dpi=120)


def main() -> None:
    args, training = HfArgumentParser((Arguments, Recipe)).parse_args_into_dataclasses()
    if (args.model is None) != (args.dataset is None):
        raise SystemExit("--model and --dataset go together: pass both, or neither for the digits.")
    push, training.push_to_hub = training.push_to_hub, False  # the finished adapter, not every checkpoint
    if push and (training.hub_model_id is None or args.model is None or Path(args.model).exists()):
        raise SystemExit("--push_to_hub needs --hub_model_id and a --model from the Hub, which the adapter names.")
    folder = Path(training.output_dir)
    set_seed(training.seed)
    if args.dataset is None:
        upright, splits = upright_and_shifted_digits()
        args.model = str(folder / "backbone")
        pretrain(Path(args.model), upright)
    else:
        splits = read_splits(args)

    image_column, label_column = find_columns(args, splits["train"].features)
    labels = class_names(splits["train"], label_column)
    with training.main_process_first(desc="checking the data"):
        for name, split in splits.items():
            split = with_checked_labels(name, split, label_column, labels)
            splits[name] = readable(name, split, image_column, args.corrupt_images)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(
            args.validation_fraction, seed=training.seed, stratify_by_column=label_column
        )
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    processor = AutoImageProcessor.from_pretrained(args.model)
    data = DatasetDict({name: prepared(split, image_column, label_column, processor) for name, split in splits.items()})

    best = None
    for scale in args.scales:
        run = copy.copy(training)
        if len(args.scales) > 1:
            run.output_dir = str(folder / f"scale-{scale:g}")
        trainer = fit(args, run, scale, labels, data)
        print_once(trainer, f"scale {scale:g}: validation accuracy {100 * trainer.state.best_metric:.1f} %")
        if best is None or trainer.state.best_metric > best.state.best_metric:
            best = trainer
    assert best is not None
    if args.storage:
        store_in(best, args.storage, args.head_storage)
    metrics = {"validation accuracy": best.state.best_metric}
    if "test" in data:
        metrics["test accuracy"] = best.evaluate(data["test"], metric_key_prefix="test")["test_accuracy"]
        print_once(best, f"test accuracy {100 * metrics['test accuracy']:.1f} %")
    finished = folder / "finished"  # beside the files of an earlier run, which it replaces as a whole
    best.save_model(str(finished))  # called by all processes, which may each hold a part
    if best.is_world_process_zero():
        processor.save_pretrained(finished)
        copy_model_card(folder, finished)
        write_model_card(finished, folder.resolve().name, metrics)
        draw(best, finished)
        replace_files(folder, finished)
        if push:  # what was saved, for the model in memory may be in parts
            classifier = load_image_classifier(folder)
            push_image_classifier(*classifier, training.hub_model_id, metrics=metrics, token=training.hub_token)
        print(f"saved in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")


def print_once(trainer: Trainer, line: str) -> None:
    if trainer.is_world_process_zero():
        print(line)


if __name__ == "__main__":
    main()
