"""A custom training loop with accelerate: FacT on a vision transformer, in one process or under any launcher.

    python examples/accelerate_loop.py
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_loop.py

The data are scikit-learn's digits. The model is a tiny untrained ViT, unless --model names another. A script that is
started again continues after the last complete checkpoint. The first command takes 22 s of CPU time and ends with

    epoch 10: validation accuracy 89.2%
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from accelerate_checkpoints import last_epoch, load_checkpoint, save_checkpoint, trained_weights
from command_line import connect_processes
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers import get_constant_schedule_with_warmup as constant_with_warmup

from fact_peft import FacTConfig

TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, default=Path("outputs/accelerate_loop"))
parser.add_argument("--model", help="folder or Hub id")
parser.add_argument("--decomposition", default="tt")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch_size", type=int, default=60, help="over all processes")
parser.add_argument("--gradient_checkpointing", action="store_true")
parser.add_argument("--mixed_precision", choices=["no", "bf16"], help="default: what the launcher says")
args = parser.parse_args()

connect_processes()
accelerator = Accelerator(
    mixed_precision=args.mixed_precision, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
)
base = args.model or args.output_dir / "base"
set_seed(0)
if not args.model and accelerator.is_main_process and not base.exists():
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=10, **TINY)).save_pretrained(base)
accelerator.wait_for_everyone()
model = AutoModelForImageClassification.from_pretrained(base, num_labels=10, ignore_mismatched_sizes=True)
set_seed(0)  # the factors start equal on all ranks
model = get_peft_model(model, FacTConfig(rank=8, decomposition=args.decomposition))
# accelerate 1.15 makes the patch embedding an FSDP2 unit of its own, which cannot be inside another one.
model._no_split_modules = [name for name in model._no_split_modules if not name.endswith("Embeddings")]
if args.gradient_checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # reentrant fails under DDP and ZeRO

pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
pixels = (pixels.float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
data = TensorDataset(torch.nn.functional.interpolate(pixels, model.config.image_size), labels)
train_data, val_data = random_split(data, [1500, len(data) - 1500], torch.Generator().manual_seed(0))
batch_size = args.batch_size // accelerator.num_processes
train_loader = DataLoader(train_data, batch_size, shuffle=True, drop_last=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=1e-4)
scheduler = constant_with_warmup(optimizer, len(train_loader))  # accelerate steps it once for every process
model, optimizer, scheduler, train_loader, val_loader = accelerator.prepare(
    model, optimizer, scheduler, train_loader, DataLoader(val_data, batch_size)
)
dtype = next(model.parameters()).dtype  # bfloat16 under DeepSpeed's mixed precision, which does not convert images

done = last_epoch(args.output_dir)
if done:
    load_checkpoint(args.output_dir / f"checkpoint-{done}", accelerator, model, optimizer, scheduler)
for epoch in range(done + 1, args.epochs + 1):
    model.train()
    train_loader.set_epoch(epoch)
    for images, targets in tqdm(train_loader, f"epoch {epoch}", leave=False, disable=not accelerator.is_main_process):
        accelerator.backward(model(pixel_values=images.to(dtype), labels=targets).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    hits = []
    for images, targets in val_loader:
        with torch.no_grad():
            predicted = model(pixel_values=images.to(dtype)).logits.argmax(-1)
        hits.append(accelerator.gather_for_metrics(predicted == targets))
    accelerator.print(f"epoch {epoch}: validation accuracy {torch.cat(hits).float().mean():.1%}")
    save_checkpoint(args.output_dir / f"checkpoint-{epoch}", accelerator, model, optimizer, scheduler)

weights = trained_weights(accelerator, model)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(args.output_dir / "adapter", state_dict=weights)
accelerator.wait_for_everyone()
