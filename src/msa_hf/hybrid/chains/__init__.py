"""Prompt chains: questions answered in steps that are data (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .chain import Chain, Condition, Extract, Loop, Retrieve, Step
    from .checking import check_chain
    from .errors import ChainError, StepError, TraceError
    from .memory_reader import InterleaveReader, MemoryReader, Reading
    from .planning import RULES, Rule, plan_by_model, plan_by_rules
    from .reading import chain_from_dict, chain_to_dict, load_chain
    from .running import ChainResult, ChainRunner
    from .sources import BankRetriever, Retriever, Source

__all__ = [
    "RULES",
    "BankRetriever",
    "Chain",
    "ChainError",
    "ChainResult",
    "ChainRunner",
    "Condition",
    "Extract",
    "InterleaveReader",
    "Loop",
    "MemoryReader",
    "Reading",
    "Retrieve",
    "Retriever",
    "Rule",
    "Source",
    "Step",
    "StepError",
    "TraceError",
    "chain_from_dict",
    "chain_to_dict",
    "check_chain",
    "load_chain",
    "plan_by_model",
    "plan_by_rules",
]

__getattr__ = exports(
    __name__,
    {
        ".chain": ["Chain", "Condition", "Extract", "Loop", "Retrieve", "Step"],
        ".checking": ["check_chain"],
        ".errors": ["ChainError", "StepError", "TraceError"],
        ".memory_reader": ["InterleaveReader", "MemoryReader", "Reading"],
        ".planning": ["RULES", "Rule", "plan_by_model", "plan_by_rules"],
        ".reading": ["chain_from_dict", "chain_to_dict", "load_chain"],
        ".running": ["ChainResult", "ChainRunner"],
        ".sources": ["BankRetriever", "Retriever", "Source"],
    },
)
