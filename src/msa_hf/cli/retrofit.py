"""`msa-hf retrofit`: a plain model gets a memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .documents import add_document_options, read_corpus
from .loading import checkpoint, new_directory
from .options import layer_list, positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.documents import Corpus
    from ..model.modeling_msa import MSAForCausalLM

NAME = "retrofit"
HELP = "Give a plain model a memory and save it."
SAMPLE = 2_000  # documents that routers are set from, at most


def add_options(made: argparse.ArgumentParser) -> None:
    """What it is told."""
    from ..model.routing_msa import SIMILARITIES

    made.add_argument("base", metavar="BASE", help="a checkpoint: directory or Hub id")
    made.add_argument("out", metavar="OUT", help="directory for the new checkpoint")
    made.add_argument("--memory-layers", type=layer_list, help="such as 20,24,27 (default: the upper half)")
    made.add_argument("--chunk-size", type=positive, default=64, help="tokens per chunk (default: 64)")
    made.add_argument("--top-k", type=positive, default=16, help="documents per memory layer (default: 16)")
    made.add_argument(
        "--rope-length",
        type=positive,
        metavar="TOKENS",
        help="of the longest text, for bases whose positions change with the length of a text, as LongRoPE and dynamic "
        "NTK (default: the longest that the base can take)",
    )
    made.add_argument("--similarity", choices=tuple(SIMILARITIES), default="cosine")
    made.add_argument("--router-init", choices=("copy", "random"), default="copy")
    made.add_argument(
        "--whiten",
        metavar="DOCS",
        help="set the routers in closed form from documents like those to come, as `encode` takes them: above chance "
        "without training, by the mean of a question's tokens",
    )
    made.add_argument("--score-bias", action="store_true", help="let scores weigh the documents in the attention")
    add_document_options(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf retrofit`."""
    from transformers import AutoTokenizer

    from ..model.modeling_msa import MSAForCausalLM

    out = new_directory(args.out)
    if out.exists() and Path(checkpoint(args.base)).exists() and out.samefile(args.base):
        raise UserError(f"{args.out}: is BASE itself, which would be overwritten; give another OUT")
    corpus = None if args.whiten is None else read_corpus(args, args.whiten)  # before the model is loaded
    with reported(foreign=True, subject=args.base):
        model = MSAForCausalLM.from_base(
            checkpoint(args.base),
            memory_layers=args.memory_layers,
            chunk_size=args.chunk_size,
            top_k=args.top_k,
            similarity=args.similarity,
            router_init=args.router_init,
            score_bias=args.score_bias,
            **({} if args.rope_length is None else {"rope_length": args.rope_length}),
        )
        tokenizer = AutoTokenizer.from_pretrained(args.base)
    if corpus is not None:
        whiten(model, tokenizer, corpus)
    with reported():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    state = "untrained" if args.whiten is None else "whitened, not trained"
    print(f"{out}: memory in layers {', '.join(map(str, model.config.memory_layers))}; the routers are {state}")
    return 0


def whiten(model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Set the routers of `model` from documents spread evenly over `corpus`; questions route by their tokens' mean."""
    from ..training.centering import center_routers, sample_rows

    places = range(0, len(corpus), -(-len(corpus) // SAMPLE))
    texts = (row["text"] for place in places for row in corpus.read(place, place + 1))
    with reported():
        center_routers(model.eval(), sample_rows(tokenizer, texts), "whiten")
    model.config.query_reduction = "mean"
