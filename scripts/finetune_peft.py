"""Fine-tune a model with a memory on your own documents and questions: LoRA, and the routers whole.

    python scripts/finetune_peft.py --base Qwen/Qwen3-0.6B --documents docs.jsonl --questions questions.jsonl \\
        --output adapter
    accelerate launch scripts/finetune_peft.py ...         # several GPUs

`docs.jsonl` holds one {"key": ..., "text": ...} a line, `questions.jsonl` one {"question": ..., "answer": ...,
"positives": [keys of the documents that answer it]}. docs/finetuning.md says what data and how many steps it takes.
It is `msa-hf train` as a script that `accelerate launch` can start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from msa_hf.data import DataError, read_documents
from msa_hf.data.questions import read_questions
from msa_hf.training import CollapsedError
from msa_hf.training.finetune import make_trainer, prepare, protocol_of, train
from msa_hf.training.settings import SettingError, TrainingError, add_options, settings_of

HELD_OUT = "--eval-questions"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Fine-tune a model with a memory: LoRA, and the routers whole.")
    made.add_argument("--base", required=True, help="a plain checkpoint, which gets a memory, or one that has a memory")
    made.add_argument("--documents", required=True, help="as `msa-hf encode` takes them")
    made.add_argument("--questions", required=True, help="JSON Lines with question, answer, positives (document keys)")
    made.add_argument("--output", required=True, help="directory of the adapter")
    add_options(made, held_out=HELD_OUT)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options, options.base, options.output)
        documents = {row["key"]: row["text"] for row in read_documents(options.documents)}
        questions = read_questions(options.questions, documents)
        prepared = prepare(settings, documents, questions, protocol_of(options.base))
        trainer = make_trainer(prepared)
        if trainer.is_world_process_zero():
            for note in prepared.notes:
                print(f"note: {note}", file=sys.stderr)
        result = train(prepared, trainer)
    except SettingError as error:
        return refuse(
            error.message(HELD_OUT if error.setting == "held_out" else f"--{error.setting.replace('_', '-')}")
        )
    except (TrainingError, DataError) as error:
        return refuse(str(error))
    except CollapsedError as error:
        return refuse(str(error), code=1)
    if result.is_main_process:
        print(result)
    return 0


def refuse(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
