"""Fine-tune any image classifier on any dataset with FacT and transformers' Trainer, on one GPU or many.

    python examples/image_classification.py
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset AI-Lab-Makerere/beans
    python examples/image_classification.py --model M --dataset imagefolder --data_dir photos --augment randaugment
    python examples/image_classification.py --model M --dataset D --mixup 0.2 --cutmix 1 --class_weights
    python examples/image_classification.py --model M --dataset D --paper --scales 0.01 0.1 1 10 100
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/image_classification.py --model M --dataset D

The defaults are those of `FacTConfig()`, with AdamW at a learning rate of 0.8 / width, warm-up over a tenth of the
steps, and cosine decay. Training images are cropped and flipped at random. --paper selects the paper's recipe instead.
Every option of transformers' TrainingArguments works: --bf16, --gradient_checkpointing, --label_smoothing_factor,
--push_to_hub and others. If the label column holds lists, a multi-label classifier is trained.

The checkpoint with the best validation accuracy, or --metric_for_best_model, is kept. The test split, if there is one,
is used once, at the end. The output folder then holds the adapter with head, labels and image processor, which
``fact_peft.load_image_classifier`` loads in one call, a model card, report.txt with precision and recall per class,
confusion.csv, and picture.png with the curves and the confusion matrix. An interrupted run that is started again
continues from its last complete checkpoint.

Without arguments it adapts a small ViT, pretrained on upright handwritten digits, to inverted and rotated digits. In
50 s of CPU time (torch 2.14, transformers 5.23, peft 0.21) it prints, after the log of every epoch,

    validation accuracy 90.0 %
    test accuracy 89.5 %
    test macro_f1 89.3 %
    saved in outputs/image_classification: README.md, adapter_config.json, adapter_model.safetensors, ...

With --paper the validation accuracy is 85.0 % (80 images) and the test accuracy 86.3 %, with one seed.
"""

# ruff: noqa: RUF009 (`flag` makes a dataclass field)

import copy
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from classification.checkpoints import Patience, WholeCheckpoints, evaluations_since_best
from classification.data import Task, find_columns, read_splits, read_task
from classification.digits import pretrain, upright_and_shifted_digits
from classification.metrics import ImageTrainer, percent, scores_of, write_reports
from command_line import connect_processes, flag, parse
from datasets import List
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import fact_peft
from fact_peft import FacTConfig

# The paper's recipe, in place of the defaults below.
PAPER: dict[str, Any] = {"rank": 8, "init": "paper", "learning_rate": 1e-3, "augment": "none"}
PAPER |= {"fact_dropout": 0.1, "drop_path": 0.1}
# A checkpoint depends on these, the data, the global batch size, and all arguments except those in AFTERWARDS.
RECIPE_FIELDS = (
    *("num_train_epochs", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps"),
    *("label_smoothing_factor", "bf16", "fp16", "seed", "metric_for_best_model", "greater_is_better", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs"),
)
AFTERWARDS = ("paper", "scales", "storage", "head_storage", "early_stopping")


@dataclass
class Arguments:
    model: str | None = flag(None, "Hub name or folder. Without: a ViT made here.")
    dataset: str | None = flag(None, "Hub name, folder, or builder such as imagefolder or parquet. Without: digits.")
    data_dir: str | None = flag(None, "Folder of the files for a dataset builder.")
    data_files: list[str] | None = flag(None, "Its files, as split=path.")
    image_column: str | None = flag(None, "Default: the one column of images.")
    label_column: str | None = flag(None, "Default: the one column of class labels, or of lists of them.")
    validation_fraction: float = flag(0.2, "Share of the training images to validate on, without a validation split.")
    corrupt_images: str = flag("stop", "What to do if some images cannot be read.", "stop", "skip")
    paper: bool = flag(False, f"Other defaults, the paper's recipe: {PAPER}.")
    rank: int = flag(16, "Rank of FacT.")
    decomposition: str = flag("tt", "Tensor train, Tucker or canonical polyadic.", "tt", "tk", "cp")
    init: str = flag(
        "orthogonal", "U and V orthonormal, or from gradients, or as in the paper.", "orthogonal", "gradients", "paper"
    )
    scales: list[float] | None = flag(None, "Scales to try; the best on the validation images is kept.")
    target_modules: list[str] | None = flag(None, "Layers to adapt. Default: the linear layers of all blocks.")
    fact_dropout: float = flag(0.0, "Dropout on the factors.")
    drop_path: float = flag(0.0, "Rate of dropped residual branches, where supported.")
    augment: str | None = flag(
        None,
        "A random crop and flip, with RandAugment or not. Default: crop; digits none.",
        "none",
        "crop",
        "randaugment",
    )
    mixup: float = flag(0.0, "Alpha of mixup, such as 0.2; 0 is off.")
    cutmix: float = flag(0.0, "Alpha of cutmix, such as 1; 0 is off. With both, either by chance.")
    class_weights: bool = flag(False, "Weight classes by the inverse of their frequency.")
    early_stopping: int | None = flag(None, "Stop after so many evaluations without a better one.")
    storage: str | None = flag(None, "Save factors in float16, bfloat16, int8, int4 or int2; tested so too.")
    head_storage: str | None = flag(None, "The same for the head. Default: as --storage, but in no less than int8.")


@dataclass
class Recipe(TrainingArguments):
    """TrainingArguments with other defaults."""

    output_dir: str = "outputs/image_classification"
    learning_rate: float | None = flag(None, "Default: 0.8 / width of the model.")
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
    metric_for_best_model: str = flag(
        "accuracy", "accuracy, macro_f1 or loss; of several labels mAP, macro_f1 or loss."
    )
    max_grad_norm: float = 1e9  # no clipping; a number, since DeepSpeed takes 0 for 1 and wants that of its own file
    remove_unused_columns: bool = False
    disable_tqdm: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()


def make_config(args: Arguments, scale: float | None) -> FacTConfig:
    return FacTConfig(
        rank=args.rank,
        decomposition=args.decomposition,
        scale=scale,
        init_weights=True if args.init == "paper" else "orthogonal",
        target_modules=args.target_modules,
        fact_dropout=args.fact_dropout,
    )


def check_arguments(args: Arguments, training: Recipe) -> None:
    """Raise an error at the start for what would otherwise fail at the end."""
    if (args.model is None) != (args.dataset is None):
        raise SystemExit("--model and --dataset go together: pass both, or neither for the digits.")
    if training.push_to_hub and (training.hub_model_id is None or args.model is None or Path(args.model).exists()):
        raise SystemExit("--push_to_hub needs --hub_model_id and a --model from the Hub, which the adapter names.")
    for callback in get_reporting_integration_callbacks(training.report_to):
        callback()  # raises an error if its package is missing
    FacTConfig(storage=args.storage, head_storage=args.head_storage)
    for scale in args.scales or [None]:
        make_config(args, scale)


def rate_of_width(model: str) -> float:
    """0.8 / width, the learning rate for the default scale."""
    config = AutoConfig.from_pretrained(model)
    width = getattr(getattr(config, "vision_config", config), "hidden_size", None)
    if width is None:
        raise SystemExit(f"{model} does not name its width; pass --learning_rate, 0.8 / width.")
    return 0.8 / width


def make_model(args: Arguments, config: FacTConfig, task: Task, seed: int) -> PeftModel:
    """The backbone with a fresh head for the labels, adapted with FacT."""
    drop_path = hasattr(AutoConfig.from_pretrained(args.model), "drop_path_rate")
    backbone = AutoModelForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(task.labels)),
        label2id={label: index for index, label in enumerate(task.labels)},
        problem_type="multi_label_classification" if task.several else "single_label_classification",
        ignore_mismatched_sizes=True,
        dtype=torch.float32,  # autocast does the mixed precision
        **({"drop_path_rate": args.drop_path} if drop_path else {}),
    )
    set_seed(seed)  # the factors start equal on all ranks, however the launcher loaded the backbone
    model = get_peft_model(backbone, config)
    # accelerate 1.15 makes the patch embedding an FSDP2 unit of its own, which cannot be inside another one.
    model._no_split_modules = [name for name in model._no_split_modules or [] if not name.endswith("Embeddings")]
    return model


def fit(args: Arguments, training: Recipe, config: FacTConfig, task: Task) -> ImageTrainer:
    """Train with one scale, or resume such a run. The trainer then has the model of the best epoch."""
    setting = {
        **{name: value for name, value in asdict(args).items() if name not in AFTERWARDS},
        "scale": config.scale,
        "labels": task.labels,
        "num_training_images": len(task.splits["train"]),
        "global_batch_size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        **{name: getattr(training, name) for name in RECIPE_FIELDS},
    }
    checkpoints = WholeCheckpoints(setting)
    resume_from = checkpoints.last(training.output_dir)
    callbacks: list[TrainerCallback] = [checkpoints]
    if args.early_stopping:
        callbacks.append(Patience(args.early_stopping))
        if resume_from is not None:
            state = TrainerState.load_from_json(str(Path(resume_from, "trainer_state.json")))
            if evaluations_since_best(state) >= args.early_stopping:  # it had stopped there
                training.max_steps = state.global_step
    set_seed(training.seed)  # the head starts the same, whatever random numbers were drawn before
    trainer = ImageTrainer(
        make_model(args, config, task, training.seed),
        training,
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["validation"],
        compute_metrics=scores_of,
        preprocess_logits_for_metrics=None if task.several else lambda logits, _: logits.argmax(-1),
        callbacks=callbacks,
    )
    trainer.class_weights = task.weights
    if args.init == "gradients" and resume_from is None:
        batches = trainer.get_eval_dataloader(task.splits["plain"].shuffle(training.seed))
        fact_peft.initialize_from_gradients(trainer.model, batches)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def save(trainer: ImageTrainer, args: Arguments, folder: Path, metrics: dict[str, float], push: bool) -> None:
    """Save the classifier with its card, and push it. Call this in all processes, since each may hold a part."""
    whole = folder / "whole"
    trainer.save_model(str(whole))
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # otherwise ZeRO-3 would shard the model that is loaded here
        processor = AutoImageProcessor.from_pretrained(args.model)
        how = {"metrics": metrics, "storage": args.storage, "head_storage": args.head_storage}
        model, _ = fact_peft.load_image_classifier(whole)
        fact_peft.save_image_classifier(model, processor, folder, **how)
        if push:
            fact_peft.push_image_classifier(
                model, processor, trainer.args.hub_model_id, token=trainer.args.hub_token, **how
            )
        shutil.rmtree(whole)
        print(f"saved in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")


def main() -> None:
    connect_processes()
    args, training = parse(Arguments, Recipe, defaults=PAPER if "--paper" in sys.argv else None)
    check_arguments(args, training)
    push, training.push_to_hub = training.push_to_hub, False  # push the finished adapter, not every checkpoint
    folder = Path(training.output_dir)
    set_seed(training.seed)
    if args.dataset is None:
        upright, splits = upright_and_shifted_digits()
        args.model, args.augment = str(folder / "backbone"), args.augment or "none"
        pretrain(Path(args.model), upright)
    if training.learning_rate is None:
        training.learning_rate = rate_of_width(args.model)
    if args.dataset:
        splits = read_splits(args.dataset, args.data_dir, args.data_files)
    columns = find_columns(splits["train"].features, args.image_column, args.label_column)
    several = isinstance(splits["train"].features[columns[1]], List)
    if several and training.metric_for_best_model == "accuracy":
        training.metric_for_best_model = "mAP"
    metric = training.metric_for_best_model.removeprefix("eval_")
    if metric not in (known := ["mAP" if several else "accuracy", "macro_f1", "loss"]):
        raise SystemExit(f"--metric_for_best_model {metric} is unknown; choose one of {', '.join(known)}.")
    task = read_task(splits, columns, args, training)

    runs: list[tuple[float, ImageTrainer]] = []
    for scale in args.scales or [None]:
        config, run = make_config(args, scale), copy.copy(training)
        if len(args.scales or []) > 1:
            run.output_dir = str(folder / f"scale-{scale:g}")
        trainer = fit(args, run, config, task)
        score = trainer.evaluate()[f"eval_{metric}"]
        if trainer.is_world_process_zero():
            tried = f"scale {scale:g}: " if args.scales else ""
            print(f"{tried}validation {metric} {percent(metric, score)}")
        runs.append((score, trainer))
    score, best = (max if training.greater_is_better else min)(runs, key=lambda run: run[0])
    if args.storage and not (best.is_fsdp_enabled or best.is_deepspeed_enabled):  # they shard it
        fact_peft.quantize_adapter(best.model, args.storage, args.head_storage)
        score = best.evaluate()[f"eval_{metric}"]
    split = "test" if "test" in task.splits else "validation"
    prediction = best.predict(task.splits[split], metric_key_prefix=split)
    metrics = {f"validation {metric}": score}
    metrics |= {f"{split} {name}": prediction.metrics[f"{split}_{name}"] for name in scores_of(prediction)}
    if best.is_world_process_zero():
        for name in [name for name in metrics if name.startswith("test")]:
            print(f"{name} {percent(name, metrics[name])}")
        write_reports(folder, prediction, task.labels, best.state.log_history)
    save(best, args, folder, metrics, push)


if __name__ == "__main__":
    main()
