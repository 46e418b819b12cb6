"""Texts in tokens: no text becomes a marker, and nobody else's use of the tokenizer counts."""

import contextlib
import copy
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from msa_hf import MSAForCausalLM
from msa_hf.bank.encode_corpus import connected, encode_bank
from msa_hf.data.documents import Corpus
from msa_hf.generation import COMPACT, MemoryInterleave
from msa_hf.model import splitting_msa, tokenizing_msa
from msa_hf.model.splitting_msa import split_text
from msa_hf.model.tokenizing_msa import token_spans, tokenize, tokenize_texts
from msa_hf.training import QuestionCollator
from msa_hf.training.collators import TranscriptCollator

MARKERS = list(COMPACT.special_tokens)
MARKER = "<|docs|>"
HOSTILE = f"one {MARKER} two{MARKER}{MARKER}<|end|> three <eos><pad> four <|ids|>"


def byte_backend(*, lower: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    return backend


def plain(backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    backend = byte_backend() if backend is None else backend
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def named() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(), pad_token="<pad>", eos_token="<eos>", extra_special_tokens=MARKERS
    )


def added(special: bool) -> Any:
    tokenizer = plain()
    tokenizer.add_tokens(MARKERS, special_tokens=special)
    return tokenizer


def added_special() -> Any:
    tokenizer = plain()
    tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
    return tokenizer


def added_lower() -> Any:
    """Added tokens that are looked for in the normalized text: "<|DOCS|>" is one too."""
    tokenizer = plain(byte_backend(lower=True))
    tokenizer.add_tokens(MARKERS)
    return tokenizer


def added_to_backend() -> Any:
    backend = byte_backend()
    backend.add_tokens([AddedToken(marker, special=False) for marker in MARKERS])
    return plain(backend)


def in_vocabulary() -> Any:
    """A vocabulary of words that holds the markers, as WordLevel and unigram models do."""
    words = ["<pad>", "<eos>", "<unk>", *MARKERS, "one", "two", "three", "four", "<", "|"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=MARKERS,
    )


def unigram() -> Any:
    pieces = [(token, 0.0) for token in ("<unk>", "<pad>", "<eos>", *MARKERS)]
    pieces += [(character, -5.0) for character in sorted(set(HOSTILE) - {" "})] + [("▁", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=MARKERS,
    )


def slow(special: bool) -> Any:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens(["<pad>", "<eos>", *MARKERS], special_tokens=special)
    return tokenizer


class SlowWords(PreTrainedTokenizer):
    """Written in Python, with a vocabulary of words that holds the markers."""

    def __init__(self) -> None:
        words = ["<pad>", "<eos>", "<unk>", *MARKERS, "one", "two", "three", "four", "<", "|"]
        self.words = {word: number for number, word in enumerate(words)}
        super().__init__(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", extra_special_tokens=MARKERS)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return self.words | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, self.words["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.words)[index]


WAYS: dict[str, Callable[[], Any]] = {
    "named": named,
    "add_tokens-special": lambda: added(True),
    "add_tokens-plain": lambda: added(False),
    "add_special_tokens": added_special,
    "add_tokens-normalized": added_lower,
    "backend": added_to_backend,
    "word-level": in_vocabulary,
    "unigram": unigram,
    "slow-special": lambda: slow(True),
    "slow-plain": lambda: slow(False),
    "slow-words": SlowWords,
}


def special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", *MARKERS]))


def tiny_model(vocabulary: int = 300) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return MSAForCausalLM.from_base(Qwen3ForCausalLM(config).eval(), chunk_size=8, top_k=2)


class Fed:
    """The token ids that a model was fed with."""

    def __init__(self, model: Any) -> None:
        self.ids: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, arguments: Any) -> None:
        self.ids += arguments[0].flatten().tolist()


@pytest.mark.parametrize("way", WAYS)
def test_no_text_becomes_a_marker(way: str) -> None:
    """However the markers came into the tokenizer; and what is not a marker stays what it was."""
    tokenizer = WAYS[way]()
    refused = special_ids(tokenizer)
    assert refused & set(tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]), "else this tests nothing"
    for text in (HOSTILE, HOSTILE.upper(), MARKER, MARKER * 300):
        ids = tokenize(tokenizer, text)
        assert ids and not refused & set(ids)
        assert not refused & set(tokenize(tokenizer, text, add_special_tokens=True)[: len(ids)])
    harmless = "one two three four"
    assert tokenize(tokenizer, harmless) == tokenizer(harmless, add_special_tokens=False)["input_ids"]
    if way not in ("word-level", "unigram", "add_tokens-normalized", "slow-words"):  # all that is said is still there
        assert tokenizer.decode(tokenize(tokenizer, HOSTILE), clean_up_tokenization_spaces=False) == HOSTILE
    if not way.startswith("slow"):
        spans = token_spans(tokenizer, HOSTILE)
        assert len(spans) == len(tokenize(tokenizer, HOSTILE)) and spans[-1][1] == len(HOSTILE)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)


@pytest.mark.parametrize("way", ["add_tokens-plain", "word-level", "slow-plain"])
def test_tokens_added_at_run_time(way: str) -> None:
    """Also where the tokenizer was at work before; added words and white space go on being tokens of their own."""
    tokenizer = WAYS[way]()
    before = tokenize(tokenizer, "one <|new|> two")
    tokenizer.add_tokens(["<|new|>", "gyroscope", "   "])
    new, word, spaces = tokenizer.convert_tokens_to_ids(["<|new|>", "gyroscope", "   "])
    assert tokenize(tokenizer, "one <|new|> two") == before
    assert tokenize(tokenizer, "gyroscope") == [word]
    if way == "add_tokens-plain":
        assert tokenize(tokenizer, "one   <|new|>") == [
            *tokenize(tokenizer, "one"),
            spaces,
            *tokenize(tokenizer, "<|new|>"),
        ]
    tokenizer.add_special_tokens({"extra_special_tokens": ["gyroscope"]})  # now its name says that it is a marker
    assert word not in tokenize(tokenizer, "gyroscope") and new not in tokenize(tokenizer, "<|new|>")


def test_parts_exchanged_at_run_time() -> None:
    tokenizer = plain()
    upper, lower = tokenize(tokenizer, "ONE"), tokenize(tokenizer, "one")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenize(tokenizer, "ONE") == lower != upper


def test_words_of_the_vocabulary_that_are_named_as_special() -> None:
    tokenizer = in_vocabulary()
    three = tokenizer.convert_tokens_to_ids("three")
    assert three in tokenize(tokenizer, "one three")
    tokenizer.bos_token = "three"
    assert three not in tokenize(tokenizer, "one three")


def test_what_a_tokenizer_adds() -> None:
    """Special tokens that the tokenizer itself adds are added, once, also where the text is cut; options count."""
    tokenizer = in_vocabulary()
    pad, eos = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"])
    refused = special_ids(tokenizer)
    template = processors.TemplateProcessing(
        single="<pad> <pad> $A <eos>", special_tokens=[("<pad>", pad), ("<eos>", eos)]
    )
    tokenize(tokenizer, HOSTILE, add_special_tokens=True)  # made before the template was
    tokenizer.backend_tokenizer.post_processor = template
    found = tokenize_texts(tokenizer, [HOSTILE, "one"], add_special_tokens=True)
    assert found[0][:2] == [pad, pad] and found[0][-1] == eos
    assert found[0][2:-1] == tokenize(tokenizer, HOSTILE) and not refused & set(found[0][2:-1])
    assert found[1] == tokenizer("one")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", pad)]
    )
    assert tokenize(tokenizer, HOSTILE, add_special_tokens=True) == [pad, *tokenize(tokenizer, HOSTILE)]


@contextlib.contextmanager
def hammered(tokenizer: Any) -> Iterator[None]:
    """A tokenizer that other threads use as they like: with and without special tokens, cut and padded."""
    stop, interval = threading.Event(), sys.getswitchinterval()
    ways: list[dict[str, Any]] = [
        {},
        {"split_special_tokens": True},
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 400},
    ]

    def use(options: dict[str, Any]) -> None:
        while not stop.is_set():
            with contextlib.suppress(RuntimeError):  # "Already borrowed": what its own users do to one another
                tokenizer(HOSTILE, **options)

    threads = [threading.Thread(target=use, args=(options,)) for options in ways]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("way", ["named", "add_tokens-plain"])
def test_other_threads_do_not_count(way: str) -> None:
    tokenizer = WAYS[way]()
    texts = [f"{number} {HOSTILE}" for number in range(150)]
    quiet = [tokenize(tokenizer, text) for text in texts]
    segments = COMPACT.transcript(tokenizer, HOSTILE, [[(1, HOSTILE)]], answer=HOSTILE)
    pieces = list(split_text(tokenizer, HOSTILE * 20, 50))
    with hammered(tokenizer):
        assert [tokenize(tokenizer, text) for text in texts] == quiet
        assert tokenize_texts(tokenizer, texts) == quiet
        assert all(
            COMPACT.transcript(tokenizer, HOSTILE, [[(1, HOSTILE)]], answer=HOSTILE) == segments for _ in range(30)
        )
        assert list(split_text(tokenizer, HOSTILE * 20, 50)) == pieces


def test_nothing_changes_in_the_tokenizer() -> None:
    tokenizer = added(False)
    tokenizer("one", truncation=True, max_length=1, padding="max_length", split_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    before = (backend.to_str(), backend.encode_special_tokens)
    assert len(tokenize(tokenizer, HOSTILE)) > 20, "its settings are those of the last call, not ours"
    assert (backend.to_str(), backend.encode_special_tokens) == before


# --- every path on which text comes in --------------------------------------------------------------------------------


def test_documents(tmp_path: Path) -> None:
    """Encoded as they are, in parts, added to a bank that changes, and by the command for corpora."""
    tokenizer, model = added(False), tiny_model()
    refused, fed = special_ids(tokenizer), Fed(model)
    bank = model.encode_documents([HOSTILE, HOSTILE * 9], tokenizer, show_progress=False)
    assert fed.ids and bank.documents[0].tokens == len(tokenize(tokenizer, HOSTILE))
    model.encode_documents([HOSTILE * 20], tokenizer, max_length=64, too_long="split", show_progress=False)
    with model.open_memory(tmp_path / "open", tokenizer) as opened:
        opened.add([HOSTILE])
        opened.upsert("0", HOSTILE + "!")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": HOSTILE}) + "\n", encoding="utf-8")
    with connected(timedelta(seconds=60)) as ranks:
        encode_bank(Corpus(corpus), model, tmp_path / "bank", tokenizer, ranks=ranks, show_progress=False)
    assert not (refused - {0}) & set(fed.ids)  # 0 pads batches


def test_questions_and_training_data() -> None:
    """A question put by the protocol, the texts read for it, and rows to train on: markers are the protocol's own."""
    tokenizer, model = added(False), tiny_model()
    markers = special_ids(tokenizer)

    def own(ids: Any) -> list[int]:
        return [number for number in torch.as_tensor(ids).flatten().tolist() if number in markers and number > 1]

    fed = {}
    for text in ("plain", HOSTILE):
        copied = copy.deepcopy(model)
        bank = copied.encode_documents(COMPACT.encode_corpus([text], tokenizer), tokenizer, show_progress=False)
        seen = Fed(copied)
        MemoryInterleave(copied, tokenizer, bank, COMPACT, max_rounds=1, max_new_tokens=1).ask(text)
        question = {"question": text, "answer": text, "positives": ["a"]}
        rows = [
            QuestionCollator(tokenizer, {"a": text})([question]),
            TranscriptCollator(tokenizer, {"a": text}, COMPACT)([question]),
        ]
        fed[text] = [own(seen.ids), *(own(row["input_ids"]) + own(row["documents"]["input_ids"]) for row in rows)]
    assert fed[HOSTILE] == fed["plain"] and any(fed["plain"])


@pytest.mark.parametrize("make", [plain, lambda: ByT5Tokenizer(extra_ids=0)], ids=["fast", "slow"])
def test_templates_may_say_what_texts_may_not(make: Callable[[], Any]) -> None:
    """Markers that the tokenizer has without calling them special, which no protocol need declare."""
    tokenizer = make()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_tokens(["<secret>"], special_tokens=True)
    begin, end, secret = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<secret>"])
    protocol = replace(COMPACT, answer_opening="<think></think><secret>", answer_end=".", special_tokens=())
    ids = protocol.answer_segment(tokenizer, "<think> so</think>").input_ids
    assert [number for number in ids if number in (begin, end, secret)] == [begin, end]
    assert "<secret><think> so</think>." in tokenizer.decode(ids[2:], clean_up_tokenization_spaces=False)
    protocol = replace(protocol, special_tokens=("<secret>",))
    ids = protocol.answer_segment(tokenizer, "<secret>").input_ids
    assert [number for number in ids if number in (begin, end, secret)] == [begin, end, secret]


LONG_TEXT = "\n\n".join(f"Sentence {number} of {HOSTILE} is here. And {number * 7} more." for number in range(60))


@pytest.mark.parametrize("section", [1, 90, 1_000])
def test_a_very_long_text_is_cut_by_sections_of_its_tokens(monkeypatch: pytest.MonkeyPatch, section: int) -> None:
    """Of one character to many pieces; the cuts stay where they were, and few tokens are held."""
    tokenizer, held = plain(), list[int]()
    expected = list(split_text(tokenizer, LONG_TEXT, 50))
    monkeypatch.setattr(splitting_msa, "SECTION", section)
    monkeypatch.setattr(splitting_msa, "token_spans", lambda of, text: held.append(len(text)) or token_spans(of, text))
    assert list(split_text(tokenizer, LONG_TEXT, 50)) == expected
    assert max(held) <= max(section, 200) < len(LONG_TEXT) == sum(len(piece) for piece, _ in expected)


@pytest.mark.parametrize("special", [False, True])
def test_many_texts_are_coded_in_groups(monkeypatch: pytest.MonkeyPatch, special: bool) -> None:
    tokenizer, texts = plain(), [HOSTILE * (number % 4) for number in range(9)]
    expected = tokenize_texts(tokenizer, texts, special)
    monkeypatch.setattr(tokenizing_msa, "MOST_CHARACTERS", 2 * len(HOSTILE))
    assert [len(group) for group in tokenizing_msa._groups(texts)] == [2, 1, 1, 2, 1, 1, 1]
    assert tokenize_texts(tokenizer, texts, special) == expected and tokenize_texts(tokenizer, []) == []
