"""Going on with an interrupted run, and refusing one that was another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.questions import Question
from .collators import QuestionCollator, TranscriptCollator
from .settings import SettingError, Settings

SETTINGS_FILE = "training_settings.json"
STATE_FILE = "trainer_state.json"  # the last that Trainer writes of a checkpoint
OTHERS = {
    "data": "other documents or questions",
    "protocol": "another protocol",
    "chat_template": "another chat template",
}


def checkpoint_to_resume(settings: Settings, record: Mapping[str, object]) -> Path | None:
    """The last whole checkpoint of an interrupted run, if that is what goes on here."""
    output = Path(settings.output)
    there = [path for path in checkpoints_in(output) if (path / STATE_FILE).exists()]
    if not settings.resume:
        if there:
            message = "{} {}: holds {} of an interrupted run; go on with --resume, or give another directory"
            raise SettingError("output", message, output, there[-1].name)
        return None
    if not there:
        raise SettingError("resume", "{}: {} holds no checkpoint of an interrupted run", output)
    try:
        before = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError("resume", "{}: {} cannot be read ({})", output / SETTINGS_FILE, error) from None
    for name, value in record.items():
        if before.get(name) != value:
            if name in OTHERS:
                raise SettingError("resume", "{}: the interrupted run had " + OTHERS[name])
            raise SettingError(name, "{} is {}, but was {} in the interrupted run", value, before.get(name))
    return there[-1]


def checkpoints_in(output: Path) -> list[Path]:
    """Checkpoints of a Trainer in a directory, the latest last."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


def digest_of(documents: Mapping[str, str], questions: Sequence[Question]) -> str:
    data = json.dumps([list(documents.items()), list(questions)], sort_keys=True)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()


class ResumeDrawing(TrainerCallback):
    """Tells the collator how many batches there were before the run began, or went on."""

    def __init__(self, collator: QuestionCollator | TranscriptCollator) -> None:
        self.collator = collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.collator.drawn = state.global_step * args.gradient_accumulation_steps
