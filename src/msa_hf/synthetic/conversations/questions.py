"""The questions about a conversation, by type."""

from __future__ import annotations

from dataclasses import dataclass

NEVER_SAID = "not in memory"  # what answers an unanswerable question, unless the reader has other words for it

# Type -> its sorts.
KINDS: dict[str, tuple[str, ...]] = {
    "single session": ("said once", "pinned"),
    "across sessions": ("named elsewhere", "said of another", "comparison"),
    "update": ("updated once", "updated more often"),
    "time": ("as of a day", "before", "which first"),
    "unanswerable": ("never said", "withdrawn"),
}


@dataclass(frozen=True, slots=True)
class TalkQuestion:
    """A question about a conversation, put after its end.

    Attributes:
        kind: a key of `KINDS`; sort: one of that kind.
        text: the question.
        answer: as it stands in the turns; None where there is none.
        evidence: numbers of the turns that it takes; of a withdrawn fact the turn that withdraws it.
        stale: answers that were right once, or that were withdrawn: whoever gives one of them read the wrong turn.
        seen: what the question asks about, as pairs of a person and the name of an attribute.
    """

    kind: str
    sort: str
    text: str
    answer: str | None
    evidence: tuple[int, ...]
    stale: tuple[str, ...] = ()
    seen: tuple[tuple[str, str], ...] = ()
