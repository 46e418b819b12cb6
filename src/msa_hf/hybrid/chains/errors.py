"""Errors of chains."""

from __future__ import annotations


class ChainError(ValueError):
    """A chain that cannot run; the message names the place in it, the cause and the remedy."""


class StepError(ChainError):
    """A step that failed while its chain ran; steps that were done are in the trace.

    Attributes:
        step: its path, such as `hops[1].found`.
        answer: as a model wrote it, where the answer is what failed; else None.
    """

    def __init__(self, step: str, problem: str, answer: str | None = None) -> None:
        super().__init__(f"step {step}: {problem}")
        self.step, self.answer = step, answer


class TraceError(ValueError):
    """A trace that cannot be read, or is one of something else."""
