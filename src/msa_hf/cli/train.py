"""`msa-hf train`: a model learns to use its memory."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..data.documents import Corpus
from ..data.questions import read_questions
from ..training import CollapsedError
from ..training.settings import SettingError, add_options, settings_of
from ..user_errors import UserError, complain, reported
from .loading import checkpoint, new_directory, protocol_of
from .options import add_protocol_option, command


def add_to(commands: Any) -> None:
    """The command and its options."""
    made = command(commands, "train", run, "Train a model with a memory on your own documents and questions.")
    made.add_argument("model", metavar="MODEL", help="a checkpoint, plain or with a memory: directory or Hub id")
    made.add_argument("documents", metavar="DOCUMENTS", help="all of them, as `encode` takes its SOURCE")
    made.add_argument("questions", metavar="QUESTIONS", help="a .jsonl: question, answer, positives (document keys)")
    made.add_argument("out", metavar="OUT", help="directory for the result")
    add_protocol_option(made)
    add_options(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf train`."""
    from ..training import finetune  # transformers.Trainer, which no other command needs

    names = {"base": "MODEL", "output": "OUT"}
    new_directory(args.out)
    with reported():
        corpus = Corpus(args.documents)
        documents = {
            str(number if row.get(corpus.key_column) is None else row[corpus.key_column]): row[corpus.text_column]
            for number, row in enumerate(corpus)
        }
        try:
            settings = settings_of(args, checkpoint(args.model), args.out)
            protocol = protocol_of(args.protocol, args.model)
            prepared = finetune.prepare(settings, documents, read_questions(args.questions, documents), protocol)
            trainer = finetune.make_trainer(prepared)
            if trainer.is_world_process_zero():
                for note in prepared.notes:
                    print(f"msa-hf: {note}", file=sys.stderr)
            result = finetune.train(prepared, trainer)
        except SettingError as error:
            option = names.get(error.setting, f"--{error.setting.replace('_', '-')}")
            raise UserError(error.said(option)) from error
        except CollapsedError as error:
            complain(error)
            return 1
    if result.speaks:
        print(result)
    return 0
