"""`PromptProtocol`: the words between a model and its memory, as data.

How a document is wrapped for encoding, how a question is put, how documents are named, how their texts are handed back
and how the answer begins and ends. Training and inference build their token sequences here, so that they cannot differ.
"""

from __future__ import annotations

import functools
import json
import re
import string
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from ..json_object import JsonObject
from ..model.bounds_msa import read_json
from ..model.given_documents_msa import each_document
from ..model.hub_files_msa import file_beside
from ..model.publishing_msa import publish
from ..model.splitting_msa import split_text
from ..model.tokenizing_msa import plain_markers, tokenize_texts
from ..moved import renamed
from .document_ids import ID_FIELD as ID_FIELD
from .document_ids import DocumentIds as DocumentIds

PROTOCOL_FILE = "memory_protocol.json"
FORMAT_VERSION = 1
FORMATTER = string.Formatter()
DIGITS = 18  # a longer number is no id: it would not fit an int64
MOST_WIDTH, MOST_FIELDS = 64, 64  # of a field in a template, and fields of one

# Template -> the fields it must have; it may have no others.
TEMPLATES = {
    "document": {"id", "text"},
    "id_format": {"id"},
    "block_item": {"id", "text"},
    "restated": {"question"},
}
BLOCK, BLOCK_CHARACTERS = 64, 65536  # documents that are tokenized together: as many, or so much text
MARKERS = ("ids_end", "retrieval_end", "answer_end")


@dataclass(frozen=True)
class Segment:
    """A stretch of a transcript.

    Attributes:
        kind: `"prompt"`, `"ids"`, `"block"`, `"end"` (of retrieval), `"restated"` or `"answer"`.
        input_ids: tokens.
        routes: whether these tokens can route.
    """

    kind: str
    input_ids: tuple[int, ...]
    routes: bool = False

    @property
    def generated(self) -> bool:
        """Tell whether it is the model that writes these tokens, so that training puts labels on them."""
        return self.kind in ("ids", "end", "answer")


class DocumentRow(TypedDict):
    """A document for `model.encode_documents`: wrapped tokens, plain text, and the id among its metadata."""

    key: str
    text: str
    input_ids: list[int]
    metadata: dict[str, object]


@dataclass(frozen=True)
class PromptProtocol:
    """Prompts, markers and the wrapping of documents.

    Templates are `str.format` strings; a literal brace is doubled. Only the templates' own words can become markers,
    those of `special_tokens` and those that the tokenizer has without calling them special (`<think>`): a document or a
    question that contains the text of one stays text.

    A transcript is: the prompt; for every round the ids named, `ids_end`, the block of their texts; then
    `retrieval_end`, the question restated, the answer and `answer_end`. Tokens that route: the prompt's routing pieces
    and the last block.

    Attributes:
        document: how a document is encoded, of `{id}` and `{text}`. Where no model is to name it from the memory, an id
            of no characters can be written as `{id!s:.0}`. Fields of all templates are at most 64 characters wide.
        prompt: pieces of the prompt, of `{question}`, each with whether its tokens route.
        id_format: how the model names a document, of `{id}`; ends with a character that is no digit.
        ids_end: ends the ids of a round.
        block_item: one document of the appended block, of `{id}` and `{text}`.
        block_end: ends the block.
        retrieval_end: what the model says instead of ids when it has read enough.
        restated: opens the answer, of `{question}`.
        answer_opening: words that the model itself begins its answer with; taken off the answer's text.
        answer_end: ends the answer.
        prefix: the template prefix, `prefix_token_ids` of the model; not part of the prompt.
        special_tokens: the markers that are one token each; a tokenizer without them is refused.

    Raises:
        ValueError: for a template without a field it needs, or markers that cannot be told apart.
    """

    document: str
    prompt: tuple[tuple[str, bool], ...]
    id_format: str
    ids_end: str
    block_item: str
    block_end: str
    retrieval_end: str
    restated: str
    answer_opening: str
    answer_end: str
    prefix: str = ""
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple((str(text), bool(routes)) for text, routes in self.prompt))
        object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        for name, template in [
            *((name, vars(self)[name]) for name in TEMPLATES),
            *(("prompt", text) for text, _ in self.prompt),
        ]:
            _check_fields(name, template)
        for name, wanted in TEMPLATES.items():
            if (found := _fields_of(vars(self)[name])) != wanted:
                raise ValueError(f"`{name}` must have the fields {sorted(wanted)}, got {sorted(found)}.")
        if set().union(*(_fields_of(text) for text, _ in self.prompt)) != {"question"}:
            raise ValueError("`prompt` must have the field ['question'] in one of its pieces, and no other.")
        if not any(routes for _, routes in self.prompt):
            raise ValueError("`prompt` has no piece that routes; without routing tokens no document can be chosen.")
        if not self._around_id[1] or self._around_id[1][0] in string.digits:
            raise ValueError(f"`id_format` must go on after {{id}} with what is no digit, got {self.id_format!r}.")
        for name in MARKERS:
            if not vars(self)[name]:
                raise ValueError(f"`{name}` is empty; without it nothing says where that part ends.")
        if self.ids_end.startswith(self.retrieval_end) or self.retrieval_end.startswith(self.ids_end):
            raise ValueError("`ids_end` and `retrieval_end` begin alike, so they cannot be told apart.")

    @property
    def _around_id(self) -> tuple[str, str]:
        pieces = list(string.Formatter().parse(self.id_format))
        place = next(i for i, piece in enumerate(pieces) if piece[1] is not None)
        return "".join(piece[0] for piece in pieces[: place + 1]), "".join(piece[0] for piece in pieces[place + 1 :])

    # Tokens -----------------------------------------------------------------------------------------------------------

    def encode(self, tokenizer: PreTrainedTokenizerBase, template: str, **values: object) -> list[int]:
        """Token ids of a filled-in template.

        Text between special tokens is tokenized as one piece, as if the whole were.

        Raises:
            ValueError: where the tokenizer lacks a special token of this protocol.
        """
        return self._encode(tokenizer, [(template, values)])

    def encode_each(
        self, tokenizer: PreTrainedTokenizerBase, template: str, rows: Iterable[Mapping[str, object]]
    ) -> list[list[int]]:
        """Token ids of a template filled in with each of `rows`, tokenized together: the same as one at a time."""
        return self._encode_each(tokenizer, [[(template, values)] for values in rows])

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, pieces: Iterable[tuple[str, Mapping[str, object]]]
    ) -> list[int]:
        """Token ids of filled-in templates that follow one another without a seam."""
        return self._encode_each(tokenizer, [pieces])[0]

    def _encode_each(
        self, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[tuple[str, Mapping[str, object]]]]
    ) -> list[list[int]]:
        """Token ids of each sequence of filled-in templates."""
        special = frozenset(self.special_tokens)
        spoken, spelling = _any_of(special | plain_markers(tokenizer)), re.compile(_any_of(special).pattern, re.I)
        filled = [self._filled_in(tokenizer, pieces, spoken) for pieces in sequences]
        # Where a text spells a marker of ours, no token of its text may be that.
        spelt = [any(map(spelling.search, texts)) for texts, _ in filled]
        coded: dict[bool, Iterator[list[int]]] = {}
        for kind in set(spelt):
            own = [self._special_id(tokenizer, token) for token in self.special_tokens] if kind else []
            chosen = [
                text for (texts, _), of in zip(filled, spelt, strict=True) if of == kind for text in texts if text
            ]
            coded[kind] = iter(tokenize_texts(tokenizer, chosen, markers=own))
        found: list[list[int]] = []
        for (texts, markers), kind in zip(filled, spelt, strict=True):
            ids: list[int] = []
            for text, marker in zip(texts, [*markers, []], strict=True):
                ids += [*(next(coded[kind]) if text else ()), *marker]
            found.append(ids)
        return found

    def _filled_in(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pieces: Iterable[tuple[str, Mapping[str, object]]],
        spoken: re.Pattern[str],
    ) -> tuple[list[str], list[list[int]]]:
        """The texts of filled-in templates between markers, and the markers behind every text but the last."""
        texts: list[str] = []
        markers: list[list[int]] = []
        text = ""
        for template, values in pieces:
            for literal, name, specification, conversion in FORMATTER.parse(template):
                start = 0
                for found in spoken.finditer(literal):
                    texts.append(text + literal[start : found.start()])
                    markers.append([self._special_id(tokenizer, found.group())])
                    text, start = "", found.end()
                text += literal[start:]
                if name is not None:
                    text += format(FORMATTER.convert_field(values[name], conversion), specification or "")
        texts.append(text)
        return texts, markers

    @staticmethod
    def _special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
        number = tokenizer.convert_tokens_to_ids(token)
        if number is None or number == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {token!r}, which this protocol needs. Add `protocol.special_tokens` to "
                "the tokenizer and train the model with them, or use the protocol that the model was trained with."
            )
        return number

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make sure that a tokenizer has every special token.

        Raises:
            ValueError: naming one that it lacks.
        """
        for token in self.special_tokens:
            self._special_id(tokenizer, token)

    def prefix_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """`prefix` in tokens: what `from_base(prefix_token_ids=...)` wants."""
        return self.encode(tokenizer, _literal(self.prefix))

    def prompt_segments(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[Segment]:
        """The opening of every transcript, behind the prefix."""
        return [
            Segment("prompt", tuple(self.encode(tokenizer, text, question=question)), routes)
            for text, routes in self.prompt
        ]

    def ids_segment(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Segment:
        """The ids of a round and their end."""
        pieces: list[tuple[str, Mapping[str, object]]] = [(self.id_format, {"id": number}) for number in ids]
        return Segment("ids", tuple(self._encode(tokenizer, [*pieces, (_literal(self.ids_end), {})])))

    def block_text(self, documents: Iterable[tuple[int, str]]) -> str:
        """The text that is appended for (id, text) pairs."""
        return "".join(self.block_item.format(id=number, text=text) for number, text in documents) + self.block_end

    def block_segment(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[tuple[int, str]]) -> Segment:
        """The appended texts of (id, text) pairs and their end; they route while they are the last block."""
        pieces: list[tuple[str, Mapping[str, object]]] = [
            (self.block_item, {"id": number, "text": text}) for number, text in documents
        ]
        return Segment("block", tuple(self._encode(tokenizer, [*pieces, (_literal(self.block_end), {})])), True)

    def end_segment(self, tokenizer: PreTrainedTokenizerBase) -> Segment:
        """The end of retrieval."""
        return Segment("end", tuple(self.encode(tokenizer, _literal(self.retrieval_end))))

    def closing_segments(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[Segment]:
        """The end of retrieval and the question restated: the answer follows."""
        return [
            self.end_segment(tokenizer),
            Segment("restated", tuple(self.encode(tokenizer, self.restated, question=question))),
        ]

    def answer_segment(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> Segment:
        """An answer as the model is to write it."""
        template = f"{_literal(self.answer_opening)}{{answer}}{_literal(self.answer_end)}"
        return Segment("answer", tuple(self.encode(tokenizer, template, answer=answer)))

    def transcript(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        rounds: Sequence[Sequence[tuple[int, str]]] = (),
        closed: bool = False,
        answer: str | None = None,
    ) -> list[Segment]:
        """A whole transcript, for training and for recomputation.

        Args:
            rounds: per round the (id, text) pairs that were named and read.
            closed: with the end of retrieval and the question restated.
            answer: with this answer, and closed.
        """
        segments = self.prompt_segments(tokenizer, question)
        for documents in rounds:
            segments.append(self.ids_segment(tokenizer, [number for number, _ in documents]))
            segments.append(self.block_segment(tokenizer, documents))
        if closed or answer is not None:
            segments += self.closing_segments(tokenizer, question)
        if answer is not None:
            segments.append(self.answer_segment(tokenizer, answer))
        return segments

    @staticmethod
    def join(segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Tokens of a transcript, and which of them route: the prompt's routing pieces and the last block."""
        last = max((place for place, segment in enumerate(segments) if segment.kind == "block"), default=-1)
        ids: list[int] = []
        routes: list[bool] = []
        for place, segment in enumerate(segments):
            ids += segment.input_ids
            routes += [segment.routes and (segment.kind != "block" or place == last)] * len(segment.input_ids)
        return ids, routes

    # What the model writes --------------------------------------------------------------------------------------------

    def named_ids(self, text: str) -> tuple[list[int], str | None]:
        """Read what a model said: the ids before the first marker, in order, and that marker (None: none came).

        What is neither an id nor a marker is passed over, and so is an id cut short.
        """
        ends = [(text.index(marker), marker) for marker in (self.ids_end, self.retrieval_end) if marker in text]
        stop, marker = min(ends) if ends else (len(text), None)
        before, after = map(re.escape, self._around_id)
        found = re.finditer(rf"{before}\s*([0-9]{{1,{DIGITS}}})\s*{after}", text[:stop])
        return [int(match.group(1)) for match in found], marker

    def answer_text(self, text: str) -> str:
        """An answer without its opening and what follows its end."""
        text = text.partition(self.answer_end)[0].strip()
        return text.removeprefix(self.answer_opening.strip()).strip()

    # Documents --------------------------------------------------------------------------------------------------------

    def document_row(
        self,
        id: int,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> DocumentRow:
        """A document for `model.encode_documents`: wrapped tokens, plain text, and the id among its metadata.

        Args:
            id: stable number, by which the model will name the document.
            key: default the id.

        Raises:
            ValueError: where `metadata` has another `id`, which would be lost.
        """
        return _row(id, text, self.encode(tokenizer, self.document, id=id, text=text), key, metadata)

    def encode_corpus(
        self,
        documents: Iterable[str | Mapping[str, object]],
        tokenizer: PreTrainedTokenizerBase,
        first_id: int = 0,
        max_tokens: int | None = None,
        text_column: str = "text",
        key_column: str = "key",
    ) -> Iterator[DocumentRow]:
        """Rows for `model.encode_documents`, numbered from `first_id`, made as they are asked for.

        Texts are tokenized together, on all cores where the tokenizer has threads: up to 64 documents or 65,536
        characters are read ahead; one where `max_tokens` is given.

        Args:
            documents: texts, or mappings with a text, a key and metadata.
            first_id: 0 for a new bank; `DocumentIds(bank).next_id()` for documents that will be added to one.
            max_tokens: cut longer documents into parts `key#0`, `key#1`, ... with ids of their own, at a paragraph,
                line, sentence or word. None: never; whatever is too long for the model then raises when it is encoded.
            text_column, key_column: names of the fields of mappings.

        Raises:
            ValueError: for a document without text.
        """
        number = first_id
        # Pieces have numbers of their own, which stand in the tokens of all documents behind them.
        for block in _blocks(
            each_document(documents), text_column, key_column, first_id, BLOCK if max_tokens is None else 1
        ):
            values = [{"id": id, "text": document.text} for id, document in enumerate(block, start=number)]
            for document, ids in zip(block, self.encode_each(tokenizer, self.document, values), strict=True):
                key, text, metadata = document
                if max_tokens is None or len(ids) <= max_tokens:
                    yield _row(number, text, ids, key, metadata)
                    number += 1
                    continue
                room = max_tokens - len(self.encode(tokenizer, self.document, id=10 ** len(str(number)), text=""))
                if room < 1:
                    raise ValueError(f"`max_tokens={max_tokens}` leaves no room for text beside a document's wrapping.")
                for part, (piece, _) in enumerate(split_text(tokenizer, text, room)):
                    yield self.document_row(number, piece, tokenizer, f"{key}#{part}", {**metadata, "part": part})
                    number += 1

    # Storage ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, record: JsonObject) -> PromptProtocol:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for an unknown or missing field, naming it.
        """
        names = {field.name for field in fields(cls)}
        for problem, wrong in (("unknown", record.keys() - names), ("missing", names - record.keys())):
            if wrong:
                raise ValueError(f"{problem} field of the protocol: {', '.join(sorted(wrong))}")
        return cls(**record)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `memory_protocol.json` beside a checkpoint."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        record = {"version": FORMAT_VERSION, **self.to_dict()}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        Path(directory, PROTOCOL_FILE).write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Put `memory_protocol.json` beside a checkpoint on the Hub; without it, who loads that asks in another way.

        Args:
            repo_id: `"user/model"`; made where missing.
            private: of a repository that is made; None: the Hub's default.
            revision: a branch, made where missing. Default: main.
            commit_message: default "Upload protocol".
            token: default that of `hf auth login`, or of the variable HF_TOKEN.

        Returns:
            The commit.

        Raises:
            BankUnavailable: where the Hub refuses or cannot be reached, with the remedy.
        """
        with tempfile.TemporaryDirectory(prefix="msa-hf-push-") as made:
            self.save_pretrained(made)
            return publish(
                Path(made),
                [PROTOCOL_FILE],
                repo_id,
                repo_type="model",
                message=commit_message or "Upload protocol",
                private=private,
                revision=revision,
                token=token,
            )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> PromptProtocol:
        """Read the protocol of a checkpoint, from a directory or the Hub.

        Args:
            hub: of a checkpoint on the Hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `subfolder`.

        Raises:
            FileNotFoundError: where the checkpoint has none.
            BankUnavailable: where the Hub refuses or cannot be reached, with the remedy; also an OSError.
            ValueError: for a file that is damaged or of a newer version.
        """
        path = file_beside(name_or_path, PROTOCOL_FILE, **hub)
        if path is None:
            raise FileNotFoundError(
                f"{name_or_path} has no {PROTOCOL_FILE}: it is asked without a protocol, or by one that you make and "
                "save beside it with `save_pretrained`."
            )
        try:
            record = read_json(path)
            version = record.pop("version", None)
            if version != FORMAT_VERSION:
                raise ValueError(f"its version is {version!r}, this release reads {FORMAT_VERSION}")
            return cls.from_dict(record)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


@functools.lru_cache(maxsize=8)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    """A pattern of the longest of some tokens."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


class _Given(NamedTuple):
    """A document as a user gave it."""

    key: str
    text: str
    metadata: dict[str, object]


def _blocks(
    documents: Iterable[object], text_column: str, key_column: str, first_id: int, most: int
) -> Iterator[list[_Given]]:
    """Documents whose texts are tokenized together; no more are read ahead than that is of use for.

    Raises:
        ValueError: for a document without text.
    """
    block: list[_Given] = []
    held = 0
    for place, document in enumerate(documents):
        values: dict[str, object] = dict(document) if isinstance(document, Mapping) else {text_column: document}
        text, key = values.pop(text_column, None), values.pop(key_column, None)
        key = str(place + first_id if key is None else key)
        if set(values) == {"metadata"} and isinstance(values["metadata"], Mapping | None):
            values = dict(values["metadata"] or {})
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Document {place} (key {key!r}) has no text; leave it out.")
        block.append(_Given(key, text, values))
        held += len(text)
        if held >= BLOCK_CHARACTERS or len(block) >= most:
            yield block
            block, held = [], 0
    if block:
        yield block


def _row(id: int, text: str, ids: list[int], key: str | None, metadata: Mapping[str, object] | None) -> DocumentRow:
    """A document for `model.encode_documents`, of its token ids; see `PromptProtocol.document_row`."""
    extra = dict(metadata or {})
    if extra.get(ID_FIELD, id) != id:
        raise ValueError(
            f"Document {key or id!r} has the metadata {ID_FIELD}={extra[ID_FIELD]!r}, a name that the memory needs "
            "for its own number; rename it, or make it the document's key."
        )
    return {
        "key": str(id) if key is None else str(key),
        "text": text,
        "input_ids": ids,
        "metadata": {**extra, ID_FIELD: id},
    }


def _literal(text: str) -> str:
    """A template that says `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def _check_fields(name: str, template: str) -> None:
    """Refuse a template that makes much of little: it may come from a file of a stranger.

    Raises:
        ValueError: for too many fields, and for a format that is wide, that another field gives, or that does not fit.
    """
    found = [piece for piece in FORMATTER.parse(template) if piece[1] is not None]
    if len(found) > MOST_FIELDS:
        raise ValueError(f"`{name}` has {len(found)} fields; at most {MOST_FIELDS} are taken.")
    for _, field, specification, conversion in found:
        specification = specification or ""
        sizes = [int(digits[:DIGITS]) for digits in re.findall("[0-9]+", specification)]
        try:
            if "{" in specification or max(sizes, default=0) > MOST_WIDTH:
                raise ValueError(f"widths above {MOST_WIDTH}, and those that another field gives, are refused")
            format(FORMATTER.convert_field(0 if field == "id" else "", conversion), specification)
        except ValueError as error:
            raise ValueError(
                f"`{name}`: the format {specification[:40]!r} of {{{field}}} cannot be used: {error}."
            ) from error


def _fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


# The protocol of the published checkpoints (arXiv 2603.23516).
PUBLISHED = PromptProtocol(
    prefix="<|im_start|>user\n",
    document="<|im_start|>[{id}]. {text}[{id}]<|im_end|>",
    prompt=(
        (
            "\nPlease answer the question based on the above historical document information\n\n{question}"
            "\nPlease return all documents related to the question\n",
            True,
        ),
        ("<|im_end|>\n", False),
        ("<|im_start|>", False),
    ),
    id_format="[{id}]",
    ids_end="<|object_ref_end|>",
    block_item="[{id}]. {text}\n",
    block_end="<|object_ref_end|>",
    retrieval_end="<End-of-Retrieve>",
    restated="<|im_start|>The user's question is: {question}\n<|object_ref_end|>",
    answer_opening="The answer to the question is: ",
    answer_end="<|im_end|>",
    special_tokens=("<|im_start|>", "<|im_end|>", "<|object_ref_end|>"),
)

# For models trained from scratch: four special tokens, no instructions, every id on a line or between brackets.
COMPACT = PromptProtocol(
    document="[{id}] {text}\n[{id}]",
    prompt=(("{question}", True), ("<|ids|>", False)),
    id_format="[{id}]",
    ids_end="<|docs|>",
    block_item="[{id}] {text}\n",
    block_end="<|ids|>",
    retrieval_end="<|answer|>",
    restated="{question}\n",
    answer_opening="",
    answer_end="<|end|>",
    special_tokens=("<|ids|>", "<|docs|>", "<|answer|>", "<|end|>"),
)

__getattr__ = renamed(__name__, {"Protocol": "PromptProtocol"})
