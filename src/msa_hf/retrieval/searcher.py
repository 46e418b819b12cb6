"""`bank.search`: the documents of a bank that fit a query, by routers, by words, by an embedding model, or by all."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..bank import TieredBank
from ..bank.tiered.bank import placed_vectors
from ..bank.tiered.layer import RoutingKeys
from ..generation import DocumentIds, PromptProtocol, RoutedDocument
from ..model.hub_msa import BankUnavailable
from ..model.interface_msa import check_interface
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.routing_msa import select_documents
from ..model.unicode_msa import check_unicode
from .dense import DenseSearcher
from .dense_files import has_vectors, open_vectors
from .embedders import Embedder
from .fusion import FILE, RECIPROCAL, FusionWeights, fuse, fusion_beside
from .hits import Found, FoundByLayer, Hit, Why
from .lexical import LexicalSearcher, UnbuiltIndex, composed
from .lexical_files import open_searcher, read_record, search_in_memory
from .router_scores import RouterScores, router_scores
from .rows import CommittedRows, rows_of_bank
from .where import Where, checked_where, rows_where
from .wording import READ, fit_wording, rank_by_wording

logger = logging.getLogger(__name__)
WAYS = ("router", "lexical", "dense")
MODES = (*WAYS, "hybrid")
DEPTH = 100  # documents of each way that are fused
BATCH = 8  # questions that a model routes at once
NO_INDEX = (
    "This bank has no lexical index. Make one: `msa-hf bank index BANK --lexical` for a directory, "
    "`msa_hf.retrieval.add_lexical_index(bank)` for a bank in memory; `lexical=True` keeps one from the start."
)
NO_VECTORS = (
    "This bank has no vectors. Make them: `msa-hf bank index BANK --embedder MODEL` for a directory, "
    "`msa_hf.retrieval.add_vectors(bank, embedder)` for a bank in memory; `embedder=` keeps them from the start."
)
UNTRAINED = (
    "The routers of this model have not been trained: what they find is close to chance. Train them "
    "(docs/finetuning.md)"
)


@dataclass(frozen=True)
class _Asked:
    """The findings of one way for a batch of questions: for each its list, best first, of positions and scores."""

    lists: list[list[tuple[int, float]]]
    scores: RouterScores | None = None


@functools.lru_cache(maxsize=64)
def _weights_on_hub(name: str) -> FusionWeights | None:
    """The weights beside a checkpoint on the Hub, which is asked once in a process; None, said aloud: not found out."""
    try:
        return fusion_beside(name)
    except BankUnavailable as error:
        logger.warning("%s In this process rankings are fused by reciprocal ranks: pass `fusion` to say how.", error)
        return None


class Searcher:
    """Searches one bank.

    Args:
        bank: a `MemoryBank` of any kind, or what has a `snapshot()` of one; its state of now.
        model, tokenizer: for `"router"`.
        protocol: whose prompt puts questions to the model; None: the question and a line break.
        embedder: for `"dense"`: the model that made the bank's vectors. Default: the one that it was opened with.
        fusion: for `"hybrid"`: weights of `fit_fusion`, or `"reciprocal"`. Default: `fusion.json` beside the bank, else
            that beside the model's checkpoint where it is for the ways asked, else reciprocal ranks.
    """

    def __init__(
        self,
        bank: Any,
        *,
        model: MSAForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        protocol: PromptProtocol | None = None,
        embedder: Embedder | None = None,
        fusion: FusionWeights | str | None = None,
    ) -> None:
        check_interface(model)
        self.bank: MemoryBank = bank.snapshot() if hasattr(bank, "snapshot") else bank
        self.model, self.tokenizer, self.protocol, self.embedder = model, tokenizer, protocol, embedder
        self.ids = DocumentIds(self.bank)
        self.fusion = self._fusion(fusion)
        self._checkpoint = str(model.name_or_path or "") if fusion is None and model is not None else ""
        self._warned = False

    def _fusion(self, fusion: FusionWeights | str | None) -> FusionWeights | None:
        if fusion is not None and not isinstance(fusion, FusionWeights):
            if fusion != "reciprocal":
                raise ValueError(f"`fusion` must be FusionWeights or 'reciprocal', got {fusion!r:.80}.")
            return None
        if fusion is None and self.bank.home is not None:
            with contextlib.suppress(FileNotFoundError):
                return FusionWeights.from_pretrained(self.bank.home.directory)
        return fusion

    @functools.cached_property
    def _of_checkpoint(self) -> FusionWeights | None:
        name = self._checkpoint
        return fusion_beside(name) if not name or os.path.isdir(name) else _weights_on_hub(name)

    # What there is ----------------------------------------------------------------------------------------------------

    def _rows(self) -> CommittedRows:
        home, documents = self.bank.home, self.bank.documents
        assert home is not None
        return CommittedRows(home.commit, home.directory, "", documents)

    def lexical(self) -> LexicalSearcher:
        """The bank's lexical index.

        Raises:
            ValueError: where it has none.
            ImportError: where tantivy is missing.
        """
        found: LexicalSearcher | UnbuiltIndex | None = self.bank.indexes.get("lexical")
        if isinstance(found, UnbuiltIndex):
            home, language = self.bank.home, found.language
            found = None if home is None else open_searcher(home.directory, self._rows(), build=False)
            if found is None or found.language != language:
                found = search_in_memory(rows_of_bank(self.bank), language)
        if found is None and self.bank.home is not None:
            found = open_searcher(self.bank.home.directory, self._rows())
        if found is None:
            raise ValueError(NO_INDEX)
        self.bank.indexes["lexical"] = found
        return found

    def dense(self) -> DenseSearcher:
        """The bank's vectors.

        Raises:
            ValueError: where it has none, they are behind, or the embedding model is missing or another.
        """
        found: DenseSearcher | None = self.bank.indexes.get("dense")
        if found is None and self.bank.home is not None:
            found = open_vectors(self.bank.home.directory, self._rows())
        if found is None:
            raise ValueError(NO_VECTORS)
        found.check_embedder(self.embedder)
        self.bank.indexes["dense"] = found
        if isinstance(self.bank, TieredBank) and not isinstance(found.placed, RoutingKeys) and found.rows:
            vectors = [part.keys for part in found.parts if len(part)]
            found = found.place(placed_vectors(vectors, self.bank))
            self.bank.indexes["dense"] = found
        return found

    def ways(self) -> tuple[str, ...]:
        """The ways that `"hybrid"` asks: the routers where there is a model with trained ones, and what the bank has.

        Raises:
            ValueError: where fewer than two of the three are there, naming what is missing.
        """
        found, missing = [], []
        if self.model is None or self.tokenizer is None:
            missing.append("There is no `model` with its `tokenizer` to route.")
        elif self.model.config.routers_trained is False:
            missing.append(f"{UNTRAINED}.")
        else:
            found.append("router")
        for name, opened in (("lexical", self.lexical), ("dense", self.dense)):
            try:
                opened()
            except (ValueError, ImportError) as error:
                missing.append(str(error))
            else:
                found.append(name)
        if len(found) < 2:
            raise ValueError(
                f"A hybrid search needs two of {', '.join(WAYS)} or more; there is {found[0] if found else 'none'}. "
                + " ".join(missing)
            )
        return tuple(found)

    def kept(self) -> tuple[str, ...]:
        """What the bank itself has of lexical index and vectors.

        Raises:
            ValueError: where it has neither, or cannot use what it has.
        """
        home = self.bank.home
        there = {
            "lexical": home is not None and read_record(home.directory) is not None,
            "dense": home is not None and has_vectors(home.directory),
        }
        found = tuple(way for way, on_disk in there.items() if on_disk or way in self.bank.indexes)
        if not found:
            raise ValueError(NO_INDEX)
        for way in found:
            self.lexical() if way == "lexical" else self.dense()
        return found

    # Searching --------------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        mode: str = "hybrid",
        ways: Sequence[str] | None = None,
        depth: int = DEPTH,
        batch_size: int = BATCH,
        where: Where | None = None,
    ) -> list[list[Hit]]:
        """The k best documents for each query; see `search`."""
        for number, query in enumerate(queries):
            if not isinstance(query, str) or not query.strip():
                raise ValueError(f"Query {number} is {query!r}; a query is a text that is not empty.")
            check_unicode(query, f"Query {number}")
        for name, value in (("k", k), ("depth", depth), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")
        wanted, asked = checked_where(where), self._asked(mode, ways)
        rows = rows_where(self.bank.documents, wanted) if wanted else None
        hits: list[list[Hit]] = []
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            found = {way: self._ask(way, batch, k if mode != "hybrid" else max(depth, k), rows) for way in asked}
            for number, query in enumerate(batch):
                hits.append(self._hits(query, number, found, k, mode))
        return hits

    def rankings(self, way: str, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """The findings of one way for each query: at most k positions in the bank with their scores, best first."""
        return self._ask(way, queries, k).lists

    def fused(self, lists: Mapping[str, Sequence[tuple[int, float]]], query: str) -> list[tuple[int, float]]:
        """One ranking of all documents on the lists of the ways: fused, and read for wording if the weights say so."""
        weights = self.weights(lists)
        ranked = fuse(lists, weights, query)
        if weights is None or not weights.wording:
            return ranked
        fused = {way: lists[way] for way in weights.ways}
        return rank_by_wording(ranked, self._texts(ranked[:READ]), query, self.lexical(), weights.wording, fused)

    def weights(self, ways: Collection[str]) -> FusionWeights | None:
        """The weights by which some ways are fused; None: by reciprocal ranks.

        Those of the checkpoint give way, with a warning, where they are for others.
        """
        if self.fusion is not None:
            return self.fusion
        found = self._of_checkpoint
        if found is None or set(found.ways) == set(ways):
            return found
        if not self._warned:
            logger.warning(
                "The checkpoint's %s weighs %s; %s are fused by reciprocal ranks. Pass `fusion`, or fit weights for "
                "them (docs/retrieval.md).",
                *(FILE, ", ".join(found.ways), ", ".join(ways)),
            )
        self._warned = True
        return None

    def _texts(self, ranking: Sequence[tuple[int, float]]) -> list[str | None]:
        return [document.text for document in self.bank.documents.at([position for position, _ in ranking])]

    def fit_wording(
        self,
        weights: FusionWeights | None,
        candidates: Sequence[Mapping[str, Sequence[tuple[int, float]]]],
        gold: Sequence[Collection[int]],
        questions: Sequence[str],
    ) -> FusionWeights:
        """Fusion weights by which the best are read for their wording as well, if that finds more (`fit_wording`).

        Args:
            weights: of `fit_fusion`; None: reciprocal ranks.
            candidates: of each question, as `candidates` gives them, of ways of which one is the lexical index.
            gold: of each question, the positions of the documents that answer it.
            questions: their texts.

        Raises:
            ValueError: for a bank without a lexical index, no questions, or lists of different lengths.
        """
        if not candidates:
            raise ValueError("No questions: wording is learned from some whose documents are known.")
        made = FusionWeights(tuple(candidates[0])) if weights is None else replace(weights, wording=())
        ranked = [fuse(lists, made, query) for lists, query in zip(candidates, questions, strict=True)]
        texts = [self._texts(ranking[:READ]) for ranking in ranked]
        fused = [{way: lists[way] for way in made.ways} for lists in candidates]
        return replace(made, wording=fit_wording(ranked, texts, gold, questions, self.lexical(), lists=fused))

    def routed(self, ranking: Sequence[tuple[int, float]]) -> list[RoutedDocument]:
        """Positions with their scores, as a router would name these documents."""
        documents = self.bank.documents.at([position for position, _ in ranking])
        return [
            RoutedDocument(position, DocumentIds.of(position, document), document.key, score)
            for (position, score), document in zip(ranking, documents, strict=True)
        ]

    def documents(self, queries: Sequence[str], k: int, mode: str = "hybrid", **options: Any) -> Tensor:
        """[B, k] int64 positions of the documents found for each query, best first, -1 where fewer are: what
        `generate(force_documents=...)` takes, whose memory layers then attend to them in place of the routed ones.

        Args:
            k: at most; the bank's number of documents where that is less.
            options: as of `search`.
        """
        rows = [[hit.position for hit in hits] for hits in self.search(queries, k, mode, **options)]
        width = min(k, len(self.bank))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)

    def candidates(
        self, queries: Sequence[str], ways: Sequence[str] | None = None, depth: int = DEPTH, batch_size: int = BATCH
    ) -> list[dict[str, list[tuple[int, float]]]]:
        """The findings of each way for each query, positions and scores, best first: what `fit_fusion` takes."""
        lists: list[dict[str, list[tuple[int, float]]]] = []
        asked = self._asked("hybrid", ways)
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            found = {way: self._ask(way, batch, depth).lists for way in asked}
            lists += [{way: found[way][number] for way in asked} for number in range(len(batch))]
        return lists

    def _asked(self, mode: str, ways: Sequence[str] | None) -> tuple[str, ...]:
        if mode != "hybrid":
            if ways is not None:
                raise ValueError("`ways` belongs to mode='hybrid'.")
            return (mode,)
        if ways is None:
            return self.ways()
        if not ways or set(ways) - set(WAYS) or len(set(ways)) < len(ways):
            raise ValueError(f"`ways` must be some of {WAYS}, got {tuple(ways)!r}.")
        return tuple(way for way in WAYS if way in ways)

    def _ask(self, way: str, queries: Sequence[str], k: int, rows: np.ndarray | None = None) -> _Asked:
        """Ask one way.

        Args:
            rows: [R] bool, those that may be found; None: all that are documents.
        """
        documents = self.bank.documents
        if not len(self.bank):
            return _Asked([[] for _ in queries])
        k = min(k, len(self.bank))  # what is found is made room for at once
        if way == "lexical":
            return _Asked(self._by_words(queries, k, rows))
        if way == "dense":
            allowed = documents.visible_rows() if rows is None else rows
            best, scores = self.dense().best(queries, k, allowed, self.embedder, self.bank.device)
            return _Asked(_lists(documents.positions_of(best), scores))
        if self.model is None or self.tokenizer is None:
            raise ValueError("Searching by routers needs `model` and its `tokenizer`.")
        if self.model.config.routers_trained is False:
            logger.warning(UNTRAINED + ".")
        found = router_scores(self.model, self.tokenizer, self.bank, queries, self.protocol)
        scores = found.mean
        if rows is not None:
            absent = torch.from_numpy(~rows[documents.visible_rows()]).to(scores.device)
            scores = scores.masked_fill(absent, float("-inf"))
        return _Asked(_lists(*select_documents(scores, k)), found)

    def _by_words(self, queries: Sequence[str], k: int, rows: np.ndarray | None) -> list[list[tuple[int, float]]]:
        searcher, documents = self.lexical(), self.bank.documents
        visible = rows if rows is not None or not len(documents.deleted) else documents.visible_rows()

        def is_there(row: int) -> bool:
            return row < documents.num_rows and (visible is None or bool(visible[row]))

        lists = []
        for query in queries:
            found = searcher.best(query, k, is_there)
            positions = documents.positions_of(torch.tensor([row for row, _ in found], dtype=torch.int64)).tolist()
            lists.append([(position, score) for position, (_, score) in zip(positions, found, strict=True)])
        return lists

    def _hits(self, query: str, number: int, found: Mapping[str, _Asked], k: int, mode: str) -> list[Hit]:
        lists = {way: item.lists[number] for way, item in found.items()}
        fused_by = None
        if mode == "hybrid":
            ranked = self.fused(lists, query)[:k]
            weights = self.weights(lists)
            fused_by = RECIPROCAL if weights is None else weights.method
            if weights is not None and weights.wording:
                fused_by += ", then wording"
        else:
            ranked = lists[mode][:k]
        places = {
            way: {position: Found(rank, score) for rank, (position, score) in enumerate(ranking, 1)}
            for way, ranking in lists.items()
        }
        terms = _QueryTerms(query, self.bank.indexes["lexical"]) if "lexical" in found and len(self.bank) else None
        hits = []
        documents = self.bank.documents.at([position for position, _ in ranked])
        for rank, ((position, score), document) in enumerate(zip(ranked, documents, strict=True), 1):
            scores = found["router"].scores if "router" in found else None
            why = Why(
                router=places.get("router", {}).get(position),
                layers=_layers(scores, number, position),
                lexical=places.get("lexical", {}).get(position),
                terms=() if terms is None else terms.found_in(document.text),
                dense=places.get("dense", {}).get(position),
                fused_by=fused_by,
            )
            id = DocumentIds.of(position, document)
            hits.append(Hit(rank, document.key, position, id, score, document.text, document.metadata, why))
        return hits


def _layers(scores: RouterScores | None, question: int, position: int) -> tuple[FoundByLayer, ...]:
    if scores is None:
        return ()
    return tuple(FoundByLayer(layer, *scores.rank(layer, question, position)) for layer in scores.layers)


class _QueryTerms:
    """The words of a query, to be looked for in texts."""

    def __init__(self, query: str, searcher: LexicalSearcher) -> None:
        self._searcher = searcher
        words = re.findall(r"\w+", composed(query)) or [query]
        self._words = {word: set(searcher.terms(word)) for word in words}  # each once, in order

    def found_in(self, text: str | None) -> tuple[str, ...]:
        there = set() if text is None else set(self._searcher.terms(text))
        return tuple(word for word, terms in self._words.items() if terms & there)


def _lists(positions: Tensor, scores: Tensor) -> list[list[tuple[int, float]]]:
    return [
        [(position, score) for position, score in zip(*row, strict=True) if position >= 0]
        for row in zip(positions.tolist(), scores.tolist(), strict=True)
    ]


@overload
def search(
    bank: Any,
    query: str,
    k: int = ...,
    mode: str = ...,
    *,
    model: MSAForCausalLM | None = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    protocol: PromptProtocol | None = ...,
    embedder: Embedder | None = ...,
    fusion: FusionWeights | str | None = ...,
    ways: Sequence[str] | None = ...,
    depth: int = ...,
    batch_size: int = ...,
    where: Where | None = ...,
) -> list[Hit]: ...
@overload
def search(
    bank: Any,
    query: Sequence[str],
    k: int = ...,
    mode: str = ...,
    *,
    model: MSAForCausalLM | None = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    protocol: PromptProtocol | None = ...,
    embedder: Embedder | None = ...,
    fusion: FusionWeights | str | None = ...,
    ways: Sequence[str] | None = ...,
    depth: int = ...,
    batch_size: int = ...,
    where: Where | None = ...,
) -> list[list[Hit]]: ...
def search(
    bank: Any,
    query: str | Sequence[str],
    k: int = 10,
    mode: str = "hybrid",
    *,
    model: MSAForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    protocol: PromptProtocol | None = None,
    embedder: Embedder | None = None,
    fusion: FusionWeights | str | None = None,
    ways: Sequence[str] | None = None,
    depth: int = DEPTH,
    batch_size: int = BATCH,
    where: Where | None = None,
) -> list[Hit] | list[list[Hit]]:
    """The documents of a bank that fit a query, best first, without generating.

    Args:
        bank: of any kind, or its directory.
        query: a text, or several.
        k: hits at most. `"lexical"` finds only documents that have a word of the query.
        mode: `"router"`: the routers of the memory layers, of which a document's score is the mean. `"lexical"`: BM25.
            `"dense"`: the cosine of an embedding model's vectors. `"hybrid"`: the ways that are there, at least two.
        model, tokenizer: for `"router"`, the model that made the bank.
        protocol: whose prompt puts questions to the model (`PromptProtocol.from_pretrained`); None: the question and a
            line break.
        embedder: for `"dense"`, the model that made the bank's vectors. Default: the one that the bank was opened with.
        fusion: for `"hybrid"`: `FusionWeights`, or `"reciprocal"`. Default: as of `Searcher`.
        ways: for `"hybrid"`: those to ask, of router, lexical and dense. Default: all that are there.
        depth: documents of each way that are fused.
        batch_size: questions at once. The hits do not depend on it.
        where: values of metadata that documents have, such as `{"year": 1889, "kind": ["note", "mail"]}`: a list says
            several, of which one is enough. Ranks and scores are those among these documents; the ranks of layers,
            and what BM25 counts, those among all.

    Returns:
        hits of the query; a list of them for several.

    Raises:
        ValueError: for an empty query or what a mode lacks, with the remedy.
        ImportError: where a package is missing that a mode needs, naming the extra.
    """
    if isinstance(bank, str | Path):
        bank = MemoryBank.from_pretrained(bank, model, tokenizer)
    if not isinstance(query, str | Sequence):
        raise ValueError(f"`query` must be a text, or a list of texts, got {query!r:.80}.")
    searcher = Searcher(bank, model=model, tokenizer=tokenizer, protocol=protocol, embedder=embedder, fusion=fusion)
    queries = [query] if isinstance(query, str) else query
    hits = searcher.search(queries, k, mode, ways, depth, batch_size, where)
    return hits[0] if isinstance(query, str) else hits
