"""Reading candidates again: how likely a causal LM finds the query behind each text.

Routers, words and vectors look at a document and a query apart from each other. A model that reads the text and is then
asked how likely it finds the query sees both at once: the score of a text is the log-likelihood of the query's tokens
behind it (query likelihood; Ponte and Croft, 1998, with a language model per document; by a pretrained one in Sachan et
al., 2022, "Improving Passage Retrieval with Zero-Shot Question Generation"). It costs a forward over each candidate's
text, so only the best few dozen of a search are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.tokenizing_msa import tokenize_texts
from .fusion import RECIPROCAL, FusionWeights, fuse
from .hits import Found, Hit

OPENING = "\nQuestion:\n"  # between a text and the query; training (`msa_hf.training.ranking`) writes the same
LONGEST_TEXT = 256  # tokens of a text that are read
BATCH_TOKENS = 32_768  # texts and queries read at once, padding included


class QueryLikelihood:
    """Scores texts for a query by a causal LM, the model with the memory itself or any other.

    Args:
        model: of transformers. A model with a memory reads without it.
        tokenizer: of the model.
        longest: tokens of a text that are read at most, from its beginning.
        batch_tokens: that are read at once.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        longest: int = LONGEST_TEXT,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        for name, value in (("longest", longest), ("batch_tokens", batch_tokens)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        self.model, self.tokenizer, self.longest, self.batch_tokens = model, tokenizer, longest, batch_tokens
        self._opening = list(tokenize_texts(tokenizer, [OPENING], markers=())[0])

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of the query behind each text, in nats, summed over its tokens."""
        if not texts:
            return []
        asked, *passages = (list(ids) for ids in tokenize_texts(self.tokenizer, [query.strip(), *texts], markers=()))
        if not asked:
            raise ValueError(f"The query {query!r} has no tokens.")
        return self.token_scores(asked, passages)

    @torch.inference_mode()
    def token_scores(self, query: Sequence[int], texts: Sequence[Sequence[int]]) -> list[float]:
        """`scores` of tokens; the result does not depend on the other texts but for rounding."""
        end = [*self._opening, *query]
        rows = [[*text[: self.longest], *end] for text in texts]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        found = [0.0] * len(rows)
        while order:
            size = max(self.batch_tokens // len(rows[order[-1]]), 1)
            some, order = order[-size:], order[:-size]
            values = self._likelihoods([rows[place] for place in some], list(query)).tolist()
            for place, value in zip(some, values, strict=True):
                found[place] = value
        return found

    def _likelihoods(self, rows: Sequence[Sequence[int]], query: Sequence[int]) -> Tensor:
        """[len(rows)] float32; the rows end with the query, so the padding stands before them."""
        width, where = max(map(len, rows)), self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=where)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=where)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=len(query) + 1,
        ).logits
        wanted = torch.tensor(query, device=where).expand(len(rows), -1)
        chosen = logits[:, :-1].float().log_softmax(-1).gather(2, wanted[..., None])
        return chosen.squeeze(2).sum(1)


def reread(query: str, hits: Sequence[Hit], reader: QueryLikelihood, weights: FusionWeights | None = None) -> list[Hit]:
    """The hits of a search in the order of how they were found and of what reading them again says, fused.

    Args:
        hits: of `search`, best first; a few dozen, each of which costs a forward over its text.
        weights: of `fit_fusion`, for the ways `found` and `reader`. None: by reciprocal ranks.

    Returns:
        the same documents, ranked anew; `why.reader` has the place and log-likelihood of each.

    Raises:
        ValueError: for a hit whose text the bank does not keep, or weights for other ways.
    """
    texts = [hit.text for hit in hits if hit.text is not None]
    if len(texts) < len(hits):
        key = next(hit.key for hit in hits if hit.text is None)
        raise ValueError(f"The bank does not keep the text of {key!r}, so it cannot be read again.")
    scores = reader.scores(query, texts)
    order = sorted(range(len(hits)), key=lambda place: -scores[place])
    places = {place: Found(rank, scores[place]) for rank, place in enumerate(order, 1)}
    lists = {
        "found": [(place, hit.score) for place, hit in enumerate(hits)],
        "reader": [(place, scores[place]) for place in order],
    }
    method = RECIPROCAL if weights is None else weights.method
    return [
        replace(
            hits[place],
            rank=rank,
            score=score,
            why=replace(hits[place].why, reader=places[place], fused_by=method),
        )
        for rank, (place, score) in enumerate(fuse(lists, weights, query), 1)
    ]
