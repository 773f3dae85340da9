"""Resume a run of transformers' Trainer that may have been killed while it wrote a checkpoint.

The Trainer writes a checkpoint file by file and resumes from the newest folder, complete or not. This callback marks a
checkpoint as complete after its last file is written, and records the settings of the run.
"""

import json
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

COMPLETE = "complete.json"  # written into a checkpoint last


def evaluations_since_best(state: TrainerState) -> int:
    best = state.best_global_step or 0
    return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


class Patience(EarlyStoppingCallback):
    """Early stopping that goes on counting in a resumed run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = evaluations_since_best(state)


class WholeCheckpoints(TrainerCallback):
    """Marks complete checkpoints, and finds the last one.

    Args:
        setting: All settings that the result of the run depends on, with values that JSON can hold.
    """

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = json.loads(json.dumps(setting))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint when all processes have written their part."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
            part = folder / f"{COMPLETE}.part"
            part.write_text(json.dumps({"setting": self.setting, "files": files}, indent=1))
            part.replace(folder / COMPLETE)

    def last(self, output_dir: str) -> str | None:
        """The newest complete checkpoint below `output_dir`; None if there is none.

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
