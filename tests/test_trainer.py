"""transformers' Trainer: checkpoints hold the adapter only, and resuming changes nothing."""

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from fact_peft import FacTConfig
from fact_peft.method.decomposition import DECOMPOSITIONS

pytestmark = pytest.mark.compatibility


class RandomImages(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 5}


def train(folder, decomposition, resume_from=None):
    set_seed(0)
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=4, decomposition=decomposition, fact_dropout=0.1))
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=RandomImages(), eval_dataset=RandomImages())
    trainer.train(resume_from)
    return model.eval(), trainer.state.best_model_checkpoint


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_resumed_training_ends_bit_equal(decomposition, tmp_path):
    model, best = train(tmp_path / "whole", decomposition)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists()
    resumed, _ = train(tmp_path / "resumed", decomposition, resume_from=str(checkpoint))
    for (name, expected), value in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    loaded = PeftModel.from_pretrained(make_backbone("vit"), best).eval()
    assert torch.equal(logits(loaded, images()), logits(model, images()))
