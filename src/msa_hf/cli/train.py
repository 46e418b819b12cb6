"""`msa-hf train`: a model learns to use its memory."""

from __future__ import annotations

import argparse
import sys

from ..training import settings as training_settings
from ..user_errors import UserError, print_error, reported
from .loading import checkpoint, new_directory, protocol_of
from .options import add_protocol_option

NAME = "train"
HELP = "Train a model with a memory on your own documents and questions."


def add_options(made: argparse.ArgumentParser) -> None:
    """What it is told."""
    made.add_argument("model", metavar="MODEL", help="a checkpoint, plain or with a memory: directory or Hub id")
    made.add_argument("documents", metavar="DOCUMENTS", help="all of them, as `encode` takes its SOURCE")
    made.add_argument("questions", metavar="QUESTIONS", help="a .jsonl: question, answer, positives (document keys)")
    made.add_argument("out", metavar="OUT", help="directory for the result")
    add_protocol_option(made)
    training_settings.add_options(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf train`."""
    from ..data.documents import Corpus
    from ..data.questions import read_questions
    from ..training import CollapsedError, finetune

    names = {"base": "MODEL", "output": "OUT"}
    new_directory(args.out)
    with reported():
        corpus = Corpus(args.documents)
        documents = {
            str(number if row.get(corpus.key_column) is None else row[corpus.key_column]): row[corpus.text_column]
            for number, row in enumerate(corpus)
        }
        try:
            settings = training_settings.settings_of(args, checkpoint(args.model), args.out)
            protocol = protocol_of(args.protocol, args.model)
            prepared = finetune.prepare(settings, documents, read_questions(args.questions, documents), protocol)
            trainer = finetune.make_trainer(prepared)
            if trainer.is_world_process_zero():
                for note in prepared.notes:
                    print(f"msa-hf: {note}", file=sys.stderr)
            result = finetune.train(prepared, trainer)
        except training_settings.SettingError as error:
            option = names.get(error.setting, f"--{error.setting.replace('_', '-')}")
            raise UserError(error.said(option)) from error
        except CollapsedError as error:
            print_error(error)
            return 1
    if result.speaks:
        print(result)
    return 0
