"""A stage of `train_real.py`: queries cut out of passages, which nobody asked, but which cost nothing."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from real_rows import load, log, save, source_names, tokenized
from transformers import AutoTokenizer

from msa_hf.training.pairs import PairMaker, Passage

KINDS = ("sentence", "part", "keywords")  # of `PairMaker`: those that ask for one passage of an article


def spans(arguments: argparse.Namespace) -> None:
    """Cut queries out of passages of the further text, the same ones in every run.

    They go to `spans.pt`, which has the form of `asked0.pt`.
    """
    work = Path(arguments.work)
    names = source_names(arguments.parts)[1:]
    texts = [load(work / f"{name}.texts") for name in names]
    everywhere = [(source, place) for source, items in enumerate(texts) for place in range(len(items))]
    chosen = random.Random(0).sample(everywhere, min(arguments.passages, len(everywhere)))
    maker = PairMaker([Passage(texts[source][place], number) for number, (source, place) in enumerate(chosen)])
    made = [
        (source, place, pair.query)
        for number, (source, place) in enumerate(chosen)
        for turn in range(arguments.turns)
        if (pair := maker.one(number, turn)) is not None and pair.kind in KINDS
    ]
    queries = [query for _, _, query in made]
    flat = tokenized(AutoTokenizer.from_pretrained(arguments.base), [query + "\n" for query in queries])
    save(
        work / "spans.pt",
        {
            "tokens": flat.tokens,
            "lengths": flat.lengths,
            "texts": queries,
            "places": torch.tensor([place for _, place, _ in made]),
            "sources": torch.tensor([source for source, _, _ in made]),
            "names": names,
        },
    )
    log("cut", len(queries), "queries out of", len(chosen), "passages; for example:")
    for query in random.Random(0).sample(queries, min(12, len(queries))):
        log("   ", query)
