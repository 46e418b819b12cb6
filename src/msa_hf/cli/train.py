"""`msa-hf train`: a model learns to use its memory, from documents alone or from questions about them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields

from ..training import settings as training_settings
from ..training.router_settings import STARTS, RouterSettings
from ..user_errors import UserError, reported
from .characters import print_error
from .documents import add_document_options, read_corpus
from .loading import checkpoint, new_directory, protocol_of
from .options import add_protocol_option, layer_list, positive

NAME = "train"
HELP = (
    "Train the routers of a model on your own documents: MODEL DOCUMENTS OUT. With QUESTIONS between DOCUMENTS and "
    "OUT, routers and readers are trained on these questions alone, by transformers.Trainer."
)
OTHERS = {"labeled": "--questions", "method": f"--{training_settings.LORA}/--{training_settings.FULL}"}
SPELLED = {"base": "MODEL", "output": "OUT", "first": "--start", "compile": "--no-compile"}


def add_options(made: argparse.ArgumentParser) -> None:
    """What it is told."""
    made.add_argument("model", metavar="MODEL", help="a checkpoint, plain or with a memory: directory or Hub id")
    made.add_argument("documents", metavar="DOCUMENTS", help="all of them, as `encode` takes its SOURCE")
    made.add_argument(
        "third", metavar="[QUESTIONS]", help="a .jsonl: question, answer, positives (document keys); may be left out"
    )
    # Of its own kind of optional: one with nargs="?" is taken for absent where an option stands before it.
    made.add_argument("out", metavar="OUT", help="directory for the result").required = False
    add_protocol_option(made)
    add_document_options(made)
    training_settings.add_options(made)
    group = made.add_argument_group(
        "without QUESTIONS",
        "Defaults that differ then: 300 steps, a pool as large as memory holds, rank 24, rates of 1e-3, passages of "
        "256 tokens, a checkpoint every 50 steps. --lora, --full, --merge, --batch-size, --warmup-share and "
        "--gradient-checkpointing need QUESTIONS.",
    )

    def add(name: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        spelled = f"--{name.replace('_', '-')}"
        group.add_argument(spelled, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)

    group.add_argument(
        "--questions",
        dest="labeled",
        default=argparse.SUPPRESS,
        metavar="QUESTIONS",
        help="mix these among the pairs that are made of the documents, and train the reader on them",
    )
    group.add_argument(
        "--adapter", action="store_true", default=argparse.SUPPRESS, help="save an adapter instead of a checkpoint"
    )
    add("teacher", str, "MODEL", "a sentence-transformers model whose similarities are soft labels (default: none)")
    add("soft", float, "SHARE", "of the teacher in the labels (default: 0.4)")
    add("ask", str, "MODEL", "a causal LM that has learned to ask about passages, for further questions")
    add(
        "memory_layers",
        layer_list,
        "LAYERS",
        "of a plain MODEL, such as 18 (default: one at 3/5 of its depth)",
    )
    group.add_argument(
        "--start",
        dest="first",
        choices=STARTS,
        default=argparse.SUPPRESS,
        help="routers to start from (default: whitened ones where nobody has trained them)",
    )
    add("corpus", positive, "N", "passages to measure and find mistakes among (default: 100000; on a CPU 2000)")
    add("part_tokens", positive, "N", "tokens whose graph is held at a time (default: as memory allows)")
    group.add_argument(
        "--no-compile", dest="compile", action="store_false", default=argparse.SUPPRESS, help="compile no layers"
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf train`."""
    from ..training import CollapsedError

    given: dict[str, object] = vars(args)
    labeled = args.out is not None
    out = args.out if labeled else args.third
    _refuse_options_of_the_other_kind(given, labeled)
    new_directory(out)
    with reported():
        corpus = read_corpus(args, args.documents, quiet=os.environ.get("RANK", "0") != "0")
        documents, titles = {}, {}
        for row in corpus:
            documents[row["key"]] = row["text"]
            title = row["metadata"].get("title")
            if isinstance(title, str):
                titles[row["key"]] = title.strip()
        try:
            if labeled:
                return _train_by_questions(args, documents, args.third, out)
            return _train_by_documents(args, documents, titles, getattr(args, "labeled", None), out)
        except training_settings.SettingError as error:
            option = SPELLED.get(error.setting, f"--{error.setting.replace('_', '-')}")
            raise UserError(error.message(option)) from error
        except CollapsedError as error:
            print_error(error)
            return 1


def _refuse_options_of_the_other_kind(given: Mapping[str, object], labeled: bool) -> None:
    by_questions = {field.name for field in fields(training_settings.Settings)}
    by_documents = {field.name for field in fields(RouterSettings)}
    if labeled:
        wrong, remedy = (by_documents - by_questions) | {"labeled"}, "leave out QUESTIONS before OUT, or this option"
    else:
        wrong, remedy = by_questions - by_documents, "give QUESTIONS before OUT, or leave out this option"
    for name in sorted(wrong & given.keys()):
        option = OTHERS.get(name) or SPELLED.get(name, f"--{name.replace('_', '-')}")
        kind = "trains by documents" if labeled else "trains by QUESTIONS"
        raise UserError(f"{option}: is of a run that {kind}; {remedy}")


def _train_by_questions(args: argparse.Namespace, documents: Mapping[str, str], questions: str, out: str) -> int:
    from ..data.questions import read_questions
    from ..training import finetune

    settings = training_settings.settings_of(args, checkpoint(args.model), out)
    protocol = protocol_of(args.protocol, args.model)
    asked = read_questions(questions, documents, args.encoding)
    prepared = finetune.prepare(settings, documents, asked, protocol, chat_template=args.protocol != "none")
    trainer = finetune.make_trainer(prepared)
    if trainer.is_world_process_zero():
        for note in prepared.notes:
            print(f"msa-hf: {note}", file=sys.stderr)
    result = finetune.train(prepared, trainer)
    if result.is_main_process:
        print(result)
    return 0


def _train_by_documents(
    args: argparse.Namespace, documents: Mapping[str, str], titles: Mapping[str, str], questions: str | None, out: str
) -> int:
    from ..data.questions import read_questions
    from ..training.router_run import train_routers
    from ..training.unlabeled import prepare_routers

    names = {field.name for field in fields(RouterSettings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if "memory_layers" in given:
        given["memory_layers"] = tuple(given["memory_layers"])
    if "soft" in given and "teacher" not in given:
        raise UserError("--soft: is the share of a teacher in the labels; name one by --teacher, or leave it out")
    settings = RouterSettings(**{**given, "base": checkpoint(args.model), "output": out})
    labeled = [] if questions is None else read_questions(questions, documents, args.encoding)
    protocol = protocol_of(args.protocol, args.model)
    prepared = prepare_routers(settings, documents, labeled, protocol, titles, args.protocol != "none")
    for note in prepared.notes:
        print(f"msa-hf: {note}", file=sys.stderr)
    print(train_routers(prepared))
    return 0
