"""One adaptation of one model to one task: the plain loop behind `vtab` and `few_shot`.

The test images are looked at once training is over and never decide anything.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig, set_seed
from transformers.utils import logging

from benchmarks.paper.image_lists import ImageList, in_memory, normalize, read_list
from fact_peft import FacTConfig

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Job:
    """Everything a run depends on. Lists and the folder of the images are relative to `data`.

    `val_list` None: nothing is selected. `test_list` None: a run of a search, which must not see test images.
    """

    data: str
    task: str
    num_classes: int
    images: str
    train_list: str
    val_list: str | None
    test_list: str | None
    model: str
    decomposition: str
    rank: int
    scale: float
    normalization: str
    seed: int
    image_size: int
    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    fact_dropout: float
    drop_path: float

    def read(self, name: str) -> list[tuple[Path, int]]:
        """The images and labels of one of the lists; raises like `read_list`."""
        return read_list(Path(self.data, name), Path(self.data, self.images), self.num_classes)


def load_backbone(job: Job) -> PreTrainedModel:
    """The pretrained model with a fresh head, and with stochastic depth where the architecture has it."""
    config = AutoConfig.from_pretrained(job.model, num_labels=job.num_classes)
    if isinstance(config, TimmWrapperConfig):
        config.model_args = {**(config.model_args or {}), "drop_path_rate": job.drop_path}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = job.drop_path
    return AutoModelForImageClassification.from_pretrained(
        job.model, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def stochastic_depth(model: nn.Module) -> float:
    """The largest probability of leaving out a block; 0 in architectures without stochastic depth, such as ViT's."""
    return max((getattr(module, "drop_prob", None) or 0.0 for module in model.modules()), default=0.0)


def adapt(job: Job) -> PeftModel:
    config = FacTConfig(
        rank=job.rank,
        decomposition=job.decomposition,
        scale=job.scale,
        fact_dropout=job.fact_dropout,
        init_weights=True,  # as the authors
    )
    return get_peft_model(load_backbone(job), config)


def learning_rate(epoch: int, epochs: int, peak: float) -> float:
    """Linear warm-up from 1e-6 over a tenth of the epochs, then what is left of one cosine over all, down to 1e-5."""
    warm_up = epochs // 10
    if epoch < warm_up:
        return 1e-6 + (peak - 1e-6) * epoch / warm_up
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def scores(model: PeftModel, images: Tensor, normalization: str) -> Tensor:
    """Logits (N, classes) in float32 of uint8 images (N, 3, H, W)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        return model(pixel_values=normalize(images.to(device), normalization)).logits.float()


@torch.no_grad()
def accuracy(model: PeftModel, batches: Iterable[tuple[Tensor, Tensor]], normalization: str) -> float:
    """Per cent of the images whose largest logit is that of their label."""
    model.eval()
    hits = [scores(model, images, normalization).argmax(-1).cpu() == labels for images, labels in batches]
    return 100 * torch.cat(hits).float().mean().item()


def train_epoch(model: PeftModel, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, job: Job) -> None:
    """One pass in random order. Like the authors' it leaves out the last, smaller batch, unless it is the only one."""
    model.train()
    batches = torch.randperm(len(labels)).split(job.batch_size)
    for batch in batches[: max(1, len(labels) // job.batch_size)]:
        logits = scores(model, images[batch], job.normalization)
        F.cross_entropy(logits, labels[batch].to(logits.device)).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(job: Job) -> dict[str, Any]:
    """Train, then test the last epoch's weights and those of the epoch that was best on the validation images.

    Returns:
        ``last_epoch`` and ``val_selected``, test accuracies in per cent; ``val_best``, ``val_epoch``: the best of ten
        validations (the first of equals) and the epochs trained until then; the number of trained parameters without
        the head, the largest drop-path, images and seconds. What the lists of the job do not allow is None.
    """
    started = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(job.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = adapt(job).to(device)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loader(name: str) -> DataLoader:
        dataset = ImageList(job.read(name), job.image_size)
        return DataLoader(dataset, EVALUATION_BATCH, num_workers=4 if device == "cuda" else 0)

    images, labels = in_memory(loader(job.train_list))
    validation = in_memory(loader(job.val_list)) if job.val_list else None
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=job.weight_decay)
    val_best, val_epoch, selected = -1.0, None, {}
    for epoch in range(job.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, job.epochs, job.learning_rate)
        train_epoch(model, optimizer, images, labels, job)
        is_due = (epoch + 1) % max(1, job.epochs // 10) == 0 or epoch + 1 == job.epochs
        if validation and is_due:
            batches = zip(*(tensor.split(EVALUATION_BATCH) for tensor in validation), strict=True)
            val_accuracy = accuracy(model, batches, job.normalization)
            if val_accuracy > val_best:
                val_best, val_epoch = val_accuracy, epoch + 1
                selected = {name: value.detach().clone() for name, value in trained.items()}

    test = loader(job.test_list) if job.test_list else None
    last_epoch = accuracy(model, test, job.normalization) if test else None
    val_selected = last_epoch if val_epoch == job.epochs else None
    if test and selected and val_epoch != job.epochs:
        for name, value in trained.items():
            value.data.copy_(selected[name])
        val_selected = accuracy(model, test, job.normalization)
    return {
        "last_epoch": last_epoch,
        "val_selected": val_selected,
        "val_best": val_best if validation else None,
        "val_epoch": val_epoch,
        "parameters": sum(value.numel() for name, value in trained.items() if ".fact_" in name),
        "drop_path": stochastic_depth(model),
        "train_images": len(labels),
        "test_images": len(test.dataset) if test else None,  # type: ignore[arg-type]
        "seconds": round(time.perf_counter() - started, 1),
    }
