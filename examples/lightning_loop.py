"""FacT in Lightning, with checkpoints that hold the adapter without the backbone, and resuming from them.

    pip install lightning
    python examples/lightning_loop.py
    python examples/lightning_loop.py --epochs 20 --resume outputs/lightning_loop/last.ckpt

The data are scikit-learn's digits. The backbone is a tiny untrained ViT. Lightning saves the whole state_dict of the
module, so `AdapterModule.on_save_checkpoint` removes the frozen weights; `strict_loading = False` lets Lightning load
the rest.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import ViTConfig, ViTForImageClassification

from fact_peft import FacTConfig


class AdapterModule(LightningModule):
    """Trains the adapter of `model`.

    Args:
        model: A PEFT model of an image classifier.
        learning_rate: The learning rate of AdamW.
    """

    def __init__(self, model: PeftModel, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])  # otherwise the backbone is pickled into every checkpoint
        self.strict_loading = False  # a checkpoint has no frozen weights
        self.model = model

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return self.model(pixel_values=images, labels=labels).loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        hits = self.model(pixel_values=images).logits.argmax(-1) == labels
        self.log("accuracy", hits.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, self.hparams["learning_rate"], weight_decay=1e-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lightning_loop"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", help="checkpoint to continue from")
    args = parser.parse_args()

    seed_everything(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=10, **shape))
    module = AdapterModule(get_peft_model(vit, FacTConfig()), 0.8 / vit.config.hidden_size)

    pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    pixels = (pixels.float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    train, val = random_split(TensorDataset(pixels, labels), [1500, 297], torch.Generator().manual_seed(0))
    best = ModelCheckpoint(args.output_dir, "best", monitor="accuracy", mode="max", save_last=True)
    trainer = Trainer(max_epochs=args.epochs, callbacks=[best], logger=False, default_root_dir=args.output_dir)
    trainer.fit(module, DataLoader(train, 60, shuffle=True), DataLoader(val, 60), ckpt_path=args.resume)

    if trainer.is_global_zero:
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"], strict=False)
        module.model.save_pretrained(args.output_dir / "adapter")


if __name__ == "__main__":
    main()
