"""The trace of an answer: which documents were chosen, named, dropped and read, and what each stage cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from ..moved import renamed
from .routed_document import RoutedDocument
from .selectors import SELECTORS

NO_TEXTS = "none"  # in the place of a selector: the model answered from the memory alone
SHOWN_TEXT = 300  # characters of an appended text that `explain` shows


@dataclass(frozen=True)
class Stage:
    """Tokens that one stage processed for this question, and the wall time of the stage for its whole batch."""

    tokens: int
    seconds: float


NO_ROOM = "no room"  # the reason of a document that does not fit the model's positions beside what was read


@dataclass(frozen=True)
class Dropped:
    """A document that was named and not read.

    Attributes:
        id: as it was named.
        reason: `"unknown"`, `"duplicate"`, `"above documents_per_round"`, `"without text"` or `"no room"`.
    """

    id: int
    reason: str


@dataclass
class Round:
    """One round of retrieval.

    Attributes:
        chosen: memory layer -> the documents it chose, best first.
        combined: the layers' documents together, best first; what selectors choose from.
        generated: what the model wrote to name documents; empty where a selector does without.
        named: ids that were named, in order.
        dropped: those of them that were not read, and why.
        read: those that were.
        text: what was appended.
        ended: why retrieval ended with this round; empty where it went on.
        stages: `"prefill"` and `"select"`.
    """

    chosen: dict[int, list[RoutedDocument]]
    combined: list[RoutedDocument]
    generated: str = ""
    named: list[int] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    read: list[RoutedDocument] = field(default_factory=list)
    text: str = ""
    ended: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)


@dataclass
class Trace:
    """The way to an answer.

    Attributes:
        question, answer: texts.
        select: how documents were selected; `"none"` where no texts were read.
        rounds: in order.
        stages: `"answer"`: tokens of its prompt and its own together.
    """

    question: str
    select: str
    rounds: list[Round] = field(default_factory=list)
    answer: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def without_room(self) -> list[int]:
        """Ids of documents that were chosen and not read, since they do not fit the model's positions; each once."""
        dropped = (item.id for one in self.rounds for item in one.dropped if item.reason == NO_ROOM)
        return list(dict.fromkeys(dropped))

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON text; layers become strings, as keys of JSON objects are."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, indent=indent)

    def explain(self, show: bool = True) -> str:
        """All of it in words, to read.

        Args:
            show: print it as well.
        """
        selector = SELECTORS.get(self.select)
        chose = f"{self.select} chose" if selector and not selector.model_names_documents else "named"
        lines = [f"Question: {self.question}"]
        for number, item in enumerate(self.rounds, start=1):
            lines.append(f"Round {number}")
            for layer, documents in item.chosen.items():
                lines.append(f"  layer {layer} chose {_listed(documents)}")
            if item.generated:
                lines.append(f"  the model wrote {item.generated!r}")
            if self.select == NO_TEXTS:
                lines.append(f"  attended to {_listed(item.combined)}")
                lines += [_cost(name, stage) for name, stage in item.stages.items()]
                continue
            lines.append(f"  {chose} {item.named or 'nothing'}")
            for dropped in item.dropped:
                lines.append(f"  dropped {dropped.id}: {dropped.reason}")
            lines.append(f"  read {_listed(item.read)}")
            if item.text:
                rest = len(item.text) - SHOWN_TEXT
                lines += [f"    | {line}" for line in item.text[:SHOWN_TEXT].splitlines()]
                lines += [f"    | ... {rest} more characters"] if rest > 0 else []
            lines += [_cost(name, stage) for name, stage in item.stages.items()]
            if item.ended:
                lines.append(f"  retrieval ended: {item.ended}")
        lines.append(f"Answer: {self.answer}")
        lines += [_cost(name, stage) for name, stage in self.stages.items()]
        text = "\n".join(lines)
        if show:
            print(text)
        return text


def _listed(documents: list[RoutedDocument]) -> str:
    def name(item: RoutedDocument) -> str:
        key = "" if item.key == str(item.id) else f" {item.key}"
        return f"[{item.id}]{key}" + ("" if item.score is None else f" ({item.score:.3f})")

    return ", ".join(map(name, documents)) or "nothing"


def _cost(name: str, stage: Stage) -> str:
    return f"  {name}: {stage.tokens} tokens, {stage.seconds * 1000:.1f} ms"


__getattr__ = renamed(__name__, {"Choice": "RoutedDocument"})
