"""The kinds of planted questions, and what their twins can lack."""

from typing import Literal, get_args

ChainKind = Literal["one_hop", "two_hop", "three_hop", "four_hop", "comparison", "order", "join", "version"]
CHAIN_KINDS: tuple[ChainKind, ...] = get_args(ChainKind)
HOPS: dict[ChainKind, int] = {"one_hop": 1, "two_hop": 2, "three_hop": 3, "four_hop": 4}

Broken = Literal["unstated", "removed"]
BREAKS: tuple[Broken, ...] = get_args(Broken)
