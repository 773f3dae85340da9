"""What docs/training.md says of other trainers: Lightning, averages of weights, searches, adapters in turn."""

import sys

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_trainer import RandomImages
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments, set_seed

from fact_peft import FacTConfig

pytestmark = pytest.mark.compatibility


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            **settings,
        },
    )


def adapted(name="default"):
    set_seed(0)
    return get_peft_model(make_backbone("vit"), FacTConfig(rank=4), adapter_name=name)


def trained(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_evaluation_needs_no_label_names(tmp_path):
    trainer = Trainer(
        adapted(),
        arguments(tmp_path),
        eval_dataset=RandomImages(),
        compute_metrics=lambda answer: {"images": len(answer.label_ids)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and metrics["eval_images"] == 24


def test_the_best_of_an_adapter_with_a_name_of_its_own_is_loaded_in_one_line(tmp_path):
    model = adapted("pets")
    # The learning rate grows to where the last epoch is worse than the first.
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9, "learning_rate": 3.0}
    best = {"metric_for_best_model": "loss", "num_train_epochs": 3, "save_total_limit": 1}
    trainer = Trainer(model, arguments(tmp_path, **schedule, **best), None, RandomImages(), RandomImages())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < losses[-1], losses
    last = logits(model.eval(), images())
    model.load_adapter(f"{trainer.state.best_model_checkpoint}/pets", "pets", is_trainable=True)
    best = PeftModel.from_pretrained(make_backbone("vit"), f"{trainer.state.best_model_checkpoint}/pets").eval()
    assert torch.equal(logits(model, images()), logits(best, images()))
    assert (logits(model, images()) - last).abs().max() > 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
    assert trained(model)


def test_two_adapters_are_trained_in_turn(tmp_path):
    model = adapted("first")
    Trainer(model, arguments(tmp_path / "1"), train_dataset=RandomImages(), eval_dataset=RandomImages()).train()
    alone = adapted("second")
    model.add_adapter("second", FacTConfig(rank=4))
    model.set_adapter("second")
    first = {name: p.detach().clone() for name, p in model.named_parameters() if "first" in name}
    start = trained(model)
    assert start.keys() == trained(alone).keys()
    for name, parameter in alone.named_parameters():  # the same start, so that the same end may be asked for
        if parameter.requires_grad:
            parameter.data.copy_(start[name])
    for one, folder in ((model, "2"), (alone, "3")):
        set_seed(1)
        Trainer(one, arguments(tmp_path / folder), train_dataset=RandomImages(), eval_dataset=RandomImages()).train()
    for name, parameter in model.named_parameters():
        if "first" in name:
            assert torch.equal(parameter, first[name]), name
    for name, value in trained(alone).items():
        torch.testing.assert_close(trained(model)[name], value, msg=name)
        assert not torch.equal(value, start[name]), name
    model.save_pretrained(tmp_path / "both")
    assert {path.parent.name for path in (tmp_path / "both").glob("*/adapter_config.json")} == {"first", "second"}


@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_an_average_of_weights_is_that_of_the_factors(kind, tmp_path):
    model = adapted()
    decay = 0.9
    if kind == "timm":
        average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=decay)
        update = average.update
    else:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        update = average.update_parameters
        update(model)  # the first call copies
    expected = trained(model)
    for step in range(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)), alpha=0.1
                )
        update(model)
        for name, value in trained(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trained(average.module).items():
        torch.testing.assert_close(value, expected[name], msg=name)

    # The scale is a setting, not a weight: the copy keeps its own until it is told.
    before = logits(average.module.eval(), images())
    model.set_scale("default", 5.0)
    assert torch.equal(logits(average.module, images()), before)
    average.module.set_scale("default", 5.0)
    model.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(logits(average.module.eval(), images()), logits(model.eval(), images()))
    average.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path).eval()
    assert torch.equal(logits(loaded, images()), logits(average.module, images()))


def test_hyperparameter_search_makes_a_new_adapter_for_every_trial(tmp_path):
    pytest.importorskip("optuna", reason="optuna, an optional backend of hyperparameter_search, is missing")
    starts = []

    def new_model(trial):
        model = adapted()
        starts.append(trained(model))
        return model

    trainer = Trainer(
        args=arguments(tmp_path, num_train_epochs=1),
        model_init=new_model,
        train_dataset=RandomImages(),
        eval_dataset=RandomImages(),
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-1
    assert len(starts) >= 3
    for start in starts[1:]:
        assert all(torch.equal(value, starts[0][name]) for name, value in start.items())
    assert list(tmp_path.rglob("adapter_model.safetensors")) and not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.filterwarnings("ignore")  # what others deprecate of each other
def test_lightning_saves_and_resumes_the_adapter_alone(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning, a trainer of others, is missing")
    import lightning_loop as script

    rows = [(row["pixel_values"], row["labels"]) for row in (RandomImages()[index] for index in range(24))]

    def fit(folder, epochs, resume=None):
        """The trained tensors of the last checkpoint."""
        module = script.AdapterModule(adapted(), 1e-2)
        last = script.ModelCheckpoint(folder, save_last=True)
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = script.Trainer(max_epochs=epochs, callbacks=[last], **settings)
        trainer.fit(module, script.DataLoader(rows, 8), script.DataLoader(rows, 8), ckpt_path=resume)
        return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]

    whole = fit(tmp_path / "whole", 3)
    cut = fit(tmp_path / "cut", 1)
    resumed = fit(tmp_path / "cut", 3, tmp_path / "cut" / "last.ckpt")
    assert {f"model.{name}" for name in trained(adapted())} == whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value) and not torch.equal(cut[name], value), name

    monkeypatch.setattr(sys, "argv", ["lightning_loop.py", "--output_dir", str(tmp_path), "--epochs", "1"])
    script.main()
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(value.sum().item() for value in adapter.values()) == sorted(v.sum().item() for v in best.values())
