"""The options of what is kept with a bank for searching: a lexical index, vectors of an embedding model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported

if TYPE_CHECKING:
    import torch

    from ..retrieval import Embedder, FusionWeights

RECIPROCAL = "reciprocal"  # a directory of that name is ./reciprocal
MEAN = "mean:"  # before the name of a model in transformers' format whose last states are averaged
EMBEDDER_HELP = (
    f"a sentence-transformers model, by name or directory; {MEAN}DIRECTORY for one that averages its last states, "
    "which needs transformers alone"
)


def add_index_options(made: argparse.ArgumentParser) -> None:
    """`--lexical` and `--embedder`, of commands that make them."""
    made.add_argument(
        "--lexical",
        nargs="?",
        const=True,
        metavar="LANGUAGE",
        help="keep a lexical index for `search`; its language is English unless another is named (docs/retrieval.md)",
    )
    made.add_argument("--embedder", metavar="MODEL", help=f"keep vectors for `search` of {EMBEDDER_HELP}")


def add_fusion_option(made: argparse.ArgumentParser) -> None:
    """`--fusion`, of commands that search."""
    made.add_argument(
        "--fusion",
        metavar=f"DIRECTORY|{RECIPROCAL}",
        help=f"whose fusion.json weighs a hybrid, or {RECIPROCAL} ranks (default: the bank's, else the model's)",
    )


def fusion_of(given: str | None) -> FusionWeights | str | None:
    """The fusion that `--fusion` names; None: the default of a search."""
    if given is None or given == RECIPROCAL:
        return given
    from ..retrieval import FusionWeights

    with reported():
        return FusionWeights.from_pretrained(given)


def embedder_of(name: str | None, device: str | torch.device = "cpu") -> Embedder | None:
    """The embedding model of a name."""
    if name is None:
        return None
    from ..retrieval import MeanPoolingEmbedder, SentenceEmbedder

    try:
        with reported(foreign=True, subject=name):
            if name.startswith(MEAN):
                return MeanPoolingEmbedder(name.removeprefix(MEAN), device)
            return SentenceEmbedder(name, device)
    except ImportError as error:
        raise UserError(str(error)) from error
