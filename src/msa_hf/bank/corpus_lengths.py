"""Documents of too many tokens, found before any is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..model.tokenizing_msa import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.documents import Corpus
    from ..generation.protocol import PromptProtocol


def check_lengths(
    corpus: Corpus,
    numbers: Iterable[int],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    protocol: PromptProtocol | None = None,
) -> None:
    """Refuse documents that have more tokens than a limit.

    A text has at most as many tokens as bytes, but for tokenizers that spell characters out: so only texts of more
    bytes are tokenized, and encoding looks at all of them once more.

    Args:
        numbers: of documents of the corpus, ascending.
        limit: of tokens of a document as it is encoded; None: there is none.
        protocol: how documents are wrapped with their ids.

    Raises:
        ValueError: for the first one, naming its place and its key.
    """
    if limit is None or tokenizer is None:
        return
    wrapping = 0
    if protocol is not None:
        wrapping = len(protocol.encode(tokenizer, protocol.document, id=10 ** len(str(len(corpus))), text=""))
    for number in numbers:
        if corpus.sizes[number] + wrapping <= limit:
            continue
        (document,) = corpus.read(number, number + 1)
        text = document["text"]
        if protocol is not None:
            ids = protocol.encode(tokenizer, protocol.document, id=number, text=text)
        else:
            ids = document.get("input_ids") or tokenize(tokenizer, text)
        if len(ids) > limit:
            raise ValueError(
                f"Document {number} (key {document['key']!r}) has {len(ids)} tokens, above the limit of {limit} "
                f"({corpus.place(number)}). Pass too_long='split' to store it in parts."
            )
