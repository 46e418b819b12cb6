"""Text in tokens, none of which is a marker, whatever the text says and whoever else uses the tokenizer.

A fast tokenizer's options are state of a backend that all threads share: another thread's plain call, between setting
them and encoding, would let a document's text become special tokens, or cut it. So texts go through a copy of the
backend that nobody else knows and whose options never change.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from .unicode_msa import check_unicode

# Besides letters, digits and white space: what an added token may hold that is a word and no marker.
WORD_CHARACTERS = frozenset("-_'’.▁")
MOST_CHARACTERS = 4_000_000  # coded at a time: some hundred bytes a token, of which the ids are a few


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text, without markers; see `tokenize_texts`."""
    return tokenize_texts(tokenizer, [text], add_special_tokens)[0]


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    add_special_tokens: bool = False,
    markers: Collection[int] = (),
) -> list[list[int]]:
    """Token ids of texts, each by itself.

    A token is a marker if it is special, by its own flag or by the tokenizer's names for special tokens, or if it was
    added to the vocabulary and is not spelt like a word: text that spells a marker becomes other tokens. Words that
    were added, and runs of white space, are text like any other. Only a marker of a single character cannot be told
    from the text that spells it.

    Neither the tokenizer's settings of padding and truncation count, nor does anything change in the tokenizer.

    Args:
        tokenizer: fast ones are copied once, and again when tokens were added to them or parts exchanged.
        texts: what to tokenize.
        add_special_tokens: whether the tokenizer adds its own, at the beginning or the end.
        markers: further token ids that no text may become, however they are spelt.

    Raises:
        ValueError: for a text that is not Unicode.
    """
    for text in texts:
        check_unicode(text, f"The text {text!r:.60}")
    if not getattr(tokenizer, "is_fast", False):
        refused = _markers(tokenizer).union(markers)
        return [_tokenize_slowly(tokenizer, text, add_special_tokens, refused) for text in texts]
    private = _private_copy(tokenizer)
    refused = private.markers.union(markers)
    found = []
    for some in _groups(texts):
        coded = private.backend.encode_batch(some, add_special_tokens=add_special_tokens)
        for text, item in zip(some, coded, strict=True):
            pieces = _pieces(private.backend, text, item, refused)
            ids = [number for _, piece in pieces for number in piece.ids] if len(pieces) > 1 else pieces[0][1].ids
            if add_special_tokens and len(pieces) > 1:
                own = item.special_tokens_mask
                ids = [*item.ids[: own.index(0)], *ids, *item.ids[len(own) - own[::-1].index(0) :]]
            found.append(ids)
    return found


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, in groups of at most `MOST_CHARACTERS`, but for one of a single text."""
    group: list[str] = []
    characters = 0
    for text in texts:
        if group and characters + len(text) > MOST_CHARACTERS:
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """The characters of a text, from and up to, that each token of `tokenize` stands for, of a fast tokenizer."""
    private = _private_copy(tokenizer)
    coded = private.backend.encode(text, add_special_tokens=False)
    return [
        (first + start, last + start)
        for start, piece in _pieces(private.backend, text, coded, private.markers)
        for first, last in piece.offsets
    ]


def plain_markers(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The markers of a tokenizer that were added without being called special, as `<think>` often is: its own words for
    a model, which a template may say and a text may not."""
    if getattr(tokenizer, "is_fast", False):
        return _private_copy(tokenizer).plain
    return _plain_markers(tokenizer)


@dataclass(frozen=True)
class _PrivateCopy:
    """A backend of our own.

    Attributes:
        made_of: what the tokenizer's tokens and parts were then.
        backend: splits special tokens like text, and has every marker for one.
        markers: token ids that no text may become.
        plain: `plain_markers`.
    """

    made_of: tuple[object, ...]
    backend: Backend
    markers: frozenset[int]
    plain: frozenset[str]


_copies: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _PrivateCopy] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _private_copy(tokenizer: PreTrainedTokenizerBase) -> _PrivateCopy:
    """The copy of a fast tokenizer's backend, made now where there is none or the tokenizer has changed since."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    # Parts can be put in place of others; options such as `add_bos_token` make another post-processor.
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    states = tuple(None if part is None else part.__getstate__() for part in parts)
    flags = tuple((number, token.content, token.special) for number, token in added.items())
    made_of = (id(backend), states, frozenset(_names(tokenizer)), flags)
    found = _copies.get(tokenizer)
    if found is not None and found.made_of == made_of:
        return found
    with _lock:
        found = _copies.get(tokenizer)
        if found is None or found.made_of != made_of:
            _copies[tokenizer] = found = _copy_backend(tokenizer, backend, made_of)
    return found


def _copy_backend(tokenizer: PreTrainedTokenizerBase, backend: Backend, made_of: tuple[object, ...]) -> _PrivateCopy:
    state = json.loads(backend.to_str())
    state["padding"] = state["truncation"] = None
    names = _names(tokenizer)
    for token in state["added_tokens"]:
        # What is special can be split like text; other added tokens are always looked for first.
        token["special"] = _is_marker(token["content"], token["special"], names)
    copy = type(backend).from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return _PrivateCopy(made_of, copy, _markers(tokenizer), _plain_markers(tokenizer))


def _pieces(backend: Backend, text: str, coded: Encoding, markers: frozenset[int]) -> list[tuple[int, Encoding]]:
    """A text as it was coded, or in pieces, each with where it begins.

    Where a marker came out all the same, as the vocabulary of words may hold it, a piece ends behind the first
    character of the marker.
    """
    if markers.isdisjoint(coded.ids) or not (cuts := _cuts(coded, markers)):
        return [(0, coded)]
    starts = [0, *cuts]
    pieces = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
    return [
        (start + further, part)
        for start, piece, again in zip(
            starts, pieces, backend.encode_batch(pieces, add_special_tokens=False), strict=True
        )
        for further, part in _pieces(backend, piece, again, markers)
    ]


def _cuts(coded: Encoding, markers: frozenset[int]) -> list[int]:
    """Places in a text, ascending: behind the first character of every marker that it became."""
    found = zip(coded.ids, coded.offsets, coded.special_tokens_mask, strict=True)
    return [start + 1 for number, (start, end), own in found if number in markers and not own and end - start > 1]


def _tokenize_slowly(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, markers: frozenset[int]
) -> list[int]:
    """Tokens of a text by a tokenizer written in Python, whose options are arguments and no state."""

    def coded(text: str, **options: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **options)["input_ids"])

    ids = coded(text)
    if not markers.isdisjoint(ids):
        ids = coded(text, split_special_tokens=True)
    if not markers.isdisjoint(ids):  # the vocabulary of words holds a marker as well
        spelt = set(tokenizer.convert_ids_to_tokens([number for number in ids if number in markers]))
        pattern = "|".join(re.escape(marker) for marker in spelt if len(marker) > 1)
        cuts = [found.start() + 1 for found in re.finditer(pattern, text)] if pattern else []
        if cuts:
            pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            ids = [number for piece in pieces for number in _tokenize_slowly(tokenizer, piece, False, markers)]
    return list(tokenizer.build_inputs_with_special_tokens(ids)) if add_special_tokens else ids


def _names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens that a tokenizer itself calls so."""
    return {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}


def _markers(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that no text may become. Text that the vocabulary does not know may become the unknown token."""
    names = _names(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number for number, token in added.items() if _is_marker(token.content, token.special, names)}
    found.update(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(found - {getattr(tokenizer, "unk_token_id", None)})


def _plain_markers(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    names = _names(tokenizer)
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
    plain = (token.content for token in tokens if not token.special and token.content not in names)
    return frozenset(content for content in plain if _is_marker(content, False, names))


def _is_marker(content: str, special: bool, names: set[str]) -> bool:
    return special or content in names or not all(map(_belongs_to_words, content))


def _belongs_to_words(character: str) -> bool:
    return (
        character.isalnum()
        or character.isspace()
        or character in WORD_CHARACTERS
        or unicodedata.category(character).startswith("M")
    )
