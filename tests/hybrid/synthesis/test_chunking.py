"""Semantic chunks: texts that stay whole, limits, cuts where the subject changes, and sections of hits."""

import random
import time
from itertools import pairwise
from typing import Any

import fake_embedder
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import byte_tokenizer

from msa_hf.hybrid.synthesis import chunk_document, expand_hits, split_semantically
from msa_hf.hybrid.synthesis.chunking import _best_cuts, _sections
from msa_hf.model.tokenizing_msa import tokenize

TOKENIZER = byte_tokenizer()


class Subjects:
    """An embedding model that knows the subject of a sentence by its first letter."""

    name = "subjects"

    def embed_documents(self, texts: Any) -> torch.Tensor:
        return torch.stack([torch.eye(26)[(ord(text.strip()[0].lower()) - 97) % 26] for text in texts])

    embed_queries = embed_documents


def tokens(text: str) -> int:
    return len(tokenize(TOKENIZER, text))


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab.?!\n 。# é"), max_size=200), st.integers(8, 60), st.integers(0, 8))
def test_pieces_are_the_text_and_keep_the_limit(text: str, limit: int, least: int) -> None:
    pieces = split_semantically(text, fake_embedder.FakeEmbedder(), TOKENIZER, limit, least)
    assert "".join(pieces) == text and all(0 < tokens(piece) <= limit for piece in pieces)
    assert pieces == split_semantically(text, fake_embedder.FakeEmbedder(), TOKENIZER, limit, least)


def test_cuts_are_where_the_subject_changes() -> None:
    subjects = ["a" * 20, "b" * 20, "a" * 20, "c" * 20]
    sentences = [f"{subject} {number}. " for subject in subjects for number in range(4)]
    pieces = split_semantically("".join(sentences), Subjects(), TOKENIZER, 200, 20)
    assert pieces == ["".join(sentences[start : start + 4]) for start in range(0, 16, 4)]
    short = split_semantically("".join(sentences), Subjects(), TOKENIZER, 60, 0)  # two sentences and no third
    assert all(len({piece[0] for piece in piece.split()[::2]}) == 1 for piece in short) and len(short) == 8
    assert split_semantically("One. Two.", Subjects(), TOKENIZER, 100) == ["One. Two."]
    assert split_semantically("", Subjects(), TOKENIZER, 100) == []
    for limit, least in ((0, 0), (5, 6), (True, 0)):
        with pytest.raises(ValueError, match="limit"):
            split_semantically("a", Subjects(), TOKENIZER, limit, least)


def test_the_best_cuts_are_those_of_trying_all() -> None:
    pick = random.Random(0)
    for _ in range(150):
        size = pick.randint(1, 9)
        counts = [pick.randint(1, 12) for _ in range(size)]
        costs = [pick.choice([-1.0, -0.5, 0.0, 0.25, 0.5]) for _ in range(size - 1)]
        limit, least = pick.randint(12, 30), pick.randint(0, 12)

        def cost(cuts: tuple[int, ...], counts=counts, costs=costs, limit=limit, least=least) -> tuple[float, int]:
            edges = [0, *cuts, len(counts)]
            sizes = [sum(counts[start:end]) for start, end in pairwise(edges)]
            if max(sizes) > limit:
                return (1e9, 0)
            return (sum(costs[cut - 1] for cut in cuts) + sum(part < least for part in sizes), len(sizes))

        every = [tuple(cut for cut in range(1, size) if number >> (cut - 1) & 1) for number in range(1 << (size - 1))]
        runs = _best_cuts(counts, costs, limit, least)
        assert cost(tuple(start for start, _ in runs[1:])) == pytest.approx(min(map(cost, every)))


GUIDE = """Preface here.

# Guide
About it. More about it.
## Install
Apples are first. Apples again. Bananas come then. Bananas again.

### Deep

# Use
Cherries only.
"""


def test_a_document_becomes_chunks_that_know_their_section() -> None:
    rows = chunk_document("doc", GUIDE, Subjects(), TOKENIZER, 60, 10, {"lang": "en"})
    assert "".join(row["text"] for row in rows) == GUIDE
    assert [row["key"] for row in rows] == [f"doc#{n}" for n in range(len(rows))]
    assert [row["part"] for row in rows] == list(range(len(rows)))
    assert list(dict.fromkeys(row["section"] for row in rows)) == [
        "", "Guide", "Guide > Install", "Guide > Install > Deep", "Use"
    ]  # fmt: skip
    for row in rows:
        first, last = row["section_parts"]
        assert {rows[part]["section"] for part in range(first, last + 1)} == {row["section"]}
        assert first <= row["part"] <= last and row["parent"] == "doc" and row["lang"] == "en"
    assert [row["section"] for row in rows].count("Guide > Install") == 2
    with pytest.raises(ValueError, match="'section'"):
        chunk_document("doc", GUIDE, Subjects(), TOKENIZER, 60, metadata={"section": 1})
    with pytest.raises(ValueError, match="no text"):
        chunk_document("doc", " \n", Subjects(), TOKENIZER, 60)


def test_headings_that_make_matching_slow_are_read_in_time() -> None:
    """Long runs of what may end a heading, behind which it goes on: a second for 40 KB where this was quadratic."""
    for line, title in (("# " + "#" * 40_000 + "x", "#" * 40_000 + "x"), ("# a" + " #" * 40_000, "a"), ("# #", "#")):
        start = time.process_time()
        sections = list(_sections(f"Before.\n{line}\nBehind."))
        assert sections == [("", "Before.\n"), (title, f"{line}\nBehind.")]
        assert time.process_time() - start < 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["# A\n", "## B ##\n", "\n\n", "Apple one. ", "Bee two. ", "#no\n", " "]), max_size=14))
def test_chunks_together_are_the_document(parts: list[str]) -> None:
    text = "".join(parts)
    if not text.strip():
        return
    rows = chunk_document("doc", text, Subjects(), TOKENIZER, 24, 4)
    assert "".join(row["text"] for row in rows) == text and all(row["text"].strip() for row in rows)


def test_a_hit_returns_its_section() -> None:
    pytest.importorskip("tantivy")
    from scripted import COMPACT, memory_model

    from msa_hf.bank import BankStore

    model = memory_model(TOKENIZER, COMPACT)
    rows = chunk_document("doc", GUIDE, Subjects(), TOKENIZER, 60, 10)
    with BankStore(model, None, TOKENIZER, lexical=True) as bank:
        bank.add([*rows, {"key": "lone", "text": "Cherries and bananas."}])
        hits = bank.search("bananas apples", 3, mode="lexical")
        sections = expand_hits(hits, bank)
        by_title = {section.title: section for section in sections}
        install = by_title["Guide > Install"]
        assert install.text == GUIDE[GUIDE.index("## Install") : GUIDE.index("### Deep")] and install.missing == ()
        assert len(install.hits) == 2 and install.score == max(hit.score for hit in hits if hit.key in install.hits)
        lone = by_title[""]
        assert (lone.keys, lone.text, lone.parent) == (("lone",), "Cherries and bananas.", "lone")
        assert [section.hits[0] for section in sections] == sorted(
            (install.hits[0], "lone"), key=[hit.key for hit in hits].index
        )
        kept = next(key for key in install.keys if key != install.hits[0])
        assert bank.delete(kept)
        (again,) = [item for item in expand_hits(hits, bank) if item.title == install.title]
        assert again.missing == (kept,) and len(again.keys) == len(install.keys) - 1
    assert expand_hits([], bank) == []
