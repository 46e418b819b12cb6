"""Options that benchmarks share, and what is made of them."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ...evaluation.metrics import normalize_answer
from ...generation.selectors import SELECTORS
from ...user_errors import UserError, reported
from ..answers import check_protocol
from ..loading import checkpoint, load, protocol_of
from ..options import add_model_options, at_least, device_in, positive
from ..sizes import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...bench.result import Result
    from ...generation import PromptProtocol
    from ...model.memory_msa import MemoryBank
    from ...model.modeling_msa import MSAForCausalLM
    from ...retrieval import FusionWeights

DOCUMENT_TOKENS = 112  # of a document that texts are cut into, unless told otherwise


def sizes(text: str) -> list[int]:
    """An argument type: numbers of tokens, such as 16K,64K,1M, ascending."""
    return sorted({count(item) for item in text.split(",")})


def told(text: str) -> str:
    """An argument type: an answer, which has words."""
    if not normalize_answer(text):
        raise argparse.ArgumentTypeError(f"must say in words that there is no answer, got {text!r}")
    return text


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type: names among those known, separated by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {name!r}")
        return list(dict.fromkeys(found))

    return names


def add_asking_options(made: argparse.ArgumentParser) -> None:
    """Add options of loading and asking a model, and of where results go."""
    made.add_argument("model", metavar="MODEL", help="a checkpoint with a memory")
    add_model_options(made)
    made.add_argument("--seed", type=at_least(0), default=0, help="another one makes other questions (default: 0)")
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens encoded at a time (default: 16384)")
    made.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    made.add_argument(
        "--select",
        choices=SELECTORS,
        help="how documents are chosen for reading (default: router); hybrid goes by the words of the texts as well, "
        "weighed by the checkpoint's fusion.json if there is one",
    )
    made.add_argument("--max-rounds", type=at_least(0), help="of retrieval (default: 3), of a checkpoint with protocol")
    made.add_argument("--documents-per-round", type=positive, help="to read (default: 1)")
    made.add_argument("--quiet", action="store_true", help="no progress bars")
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    made.add_argument(
        "--out",
        metavar="FILE.json",
        type=Path,
        help="the result, written while the benchmark runs; after an interruption the same command goes on with it",
    )
    made.add_argument("--html", metavar="FILE.html", type=Path, help="the result as a page to read")


def add_batch_size_option(made: argparse.ArgumentParser) -> None:
    """Add the option of benchmarks that ask several questions at a time."""
    made.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: 8)")


def add_text_options(made: argparse.ArgumentParser, default_sizes: str) -> None:
    """Add options of what haystacks are made of."""
    made.add_argument(
        "--text",
        metavar="SOURCE",
        action="append",
        default=[],
        help="files or folders of a haystack's text, as `encode` takes them; may be repeated; for needles also a bank "
        "(default: generated)",
    )
    made.add_argument(
        "--sizes", type=sizes, default=sizes(default_sizes), help=f"in tokens, by commas (default: {default_sizes})"
    )
    add_document_tokens_option(made, "of a haystack's documents at most")


def add_document_tokens_option(made: argparse.ArgumentParser, of: str) -> None:
    """Add the option of the documents that texts are cut into; `document_tokens` says which number it is.

    Args:
        of: the documents, in words.
    """
    made.add_argument("--document-tokens", type=at_least(16), help=f"{of} (default: {DOCUMENT_TOKENS})")


def document_tokens(args: argparse.Namespace, uncut: str | None = None) -> int:
    """The most tokens of a document that texts are cut into.

    Args:
        uncut: why nothing is cut, and the remedy; None: texts are.

    Raises:
        UserError: where the option was given and nothing is cut.
    """
    given: int | None = args.document_tokens
    if given is not None and uncut is not None:
        raise UserError(f"--document-tokens {given}: {uncut}")
    return DOCUMENT_TOKENS if given is None else given


def is_bank(source: str) -> bool:
    """Tell whether a source of texts is a bank, here or on the Hub."""
    from ...model.bank_manifest_msa import holds_bank
    from ...model.hub_msa import is_hub_name

    return holds_bank(Path(source)) or is_hub_name(source)


def bank_in(args: argparse.Namespace) -> str | None:
    """The bank that `--text` names; None where it names texts or nothing."""
    banks = [source for source in args.text if is_bank(source)]
    if banks and len(args.text) > 1:
        raise UserError(f"--text {banks[0]}: a bank is a haystack by itself; name it alone")
    return banks[0] if banks else None


def texts_in(
    args: argparse.Namespace, bank: str | None, model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str] | MemoryBank:
    """The texts that were named, or the bank (`bank_in`); generated texts where nothing was."""
    from ...bench.haystack import file_texts, generated_texts

    if bank is not None:
        with reported():
            return model.load_memory(bank, tokenizer, device=model.device)
    return file_texts(args.text) if args.text else generated_texts(args.seed)


def check_outputs(args: argparse.Namespace, sources: Sequence[str] = ()) -> None:
    """Refuse, before any work, files that could not be written, those that would be read, and that of another run.

    Args:
        sources: files and folders that are read whole: a result among them would be one of the texts of the next run,
            which could not go on with it.
    """
    from ...bench.result import claimed, file_at, lock_of

    files = dict[Path, Path]()  # what a path leads to, through links
    for path in (args.out, args.html):
        if path is not None:
            with reported():
                files[path] = file = file_at(path)
            if not file.parent.is_dir():
                raise UserError(
                    f"{path}: not a file in a directory that is there; make {file.parent}, or name another file"
                )
            try:
                with tempfile.TemporaryFile(dir=file.parent):
                    pass
                if file.exists():
                    file.open("ab").close()
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    for source in sources:
        folder = os.path.realpath(source)
        for path, file in files.items():
            if any(one.is_relative_to(folder) for one in (file, Path(os.path.realpath(path.parent), path.name))):
                raise UserError(f"{path}: lies in {source}, whose files are read; name a file elsewhere")
    if args.out is not None and args.html is not None and files[args.out] == files[args.html]:
        raise UserError(f"{args.out}: --out and --html are one file; name two")
    if args.out is not None and lock_of(args.out).exists():
        with reported(), claimed(args.out):  # the run claims it again, once its model is loaded
            pass


def load_asked(args: argparse.Namespace) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase, PromptProtocol | None]:
    """The model to be asked, its tokenizer and its protocol."""
    device = device_in(args)
    checkpoint(args.model)  # what is not there is refused at once
    protocol = protocol_of(args.protocol, args.model)
    check_protocol(args, protocol)
    return *load(args.model, device, args.dtype, args.protocol), protocol


def fusion_of(args: argparse.Namespace) -> FusionWeights | None:
    """The fusion weights that the selector "hybrid" takes: those of the checkpoint; None: reciprocal ranks.

    What a hybrid lacks is said here, before the work.
    """
    if args.select != "hybrid":
        return None
    from ...retrieval.fusion import fusion_beside
    from ...retrieval.lexical import require_tantivy

    with reported():
        try:
            require_tantivy()
            return fusion_beside(args.model)
        except ImportError as error:
            raise UserError(f"--select hybrid: {error}") from error


class RunOptions(TypedDict):
    """The arguments that commands hand to the runs of benchmarks alike."""

    name: str
    fusion: FusionWeights | None
    batch_size: int
    batch_tokens: int
    show_progress: bool


def run_options(args: argparse.Namespace) -> RunOptions:
    """The options of a run, of whatever benchmark; to be asked for before the model is loaded."""
    return {
        "name": args.model,
        "fusion": fusion_of(args),
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "show_progress": not args.quiet,
    }


def show(args: argparse.Namespace, result: Result, text: str, page: str) -> None:
    """Print a result, and write its page."""
    # First, so that a page that cannot be written takes no answer with it.
    print(result.to_json() if args.json else text, end="" if args.json else "\n")
    with reported():
        if args.html is not None:
            args.html.write_text(page, encoding="utf-8", errors="backslashreplace")
