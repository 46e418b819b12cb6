"""The ways to select the documents that a round reads, one a file; `SELECTORS` is the only list of them.

Importing this loads neither torch nor transformers, so that the command line can name its choices at once.
"""

from .constrained import Constrained
from .free import Free
from .hybrid import Hybrid
from .router import Router
from .selector import Asked, Asker, Selected, SelectionRound, Selector

# The name that `select=` and `--select` take -> the class. All else that needs to know of selectors reads this.
SELECTORS: dict[str, type[Selector]] = {
    "generate": Free,
    "constrained": Constrained,
    "router": Router,
    "hybrid": Hybrid,
}


def selector_named(name: str) -> type[Selector]:
    """The class of a selector.

    Raises:
        ValueError: for a name that is not in `SELECTORS`.
    """
    if name not in SELECTORS:
        raise ValueError(f"`select` must be one of {tuple(SELECTORS)}, got {name!r}.")
    return SELECTORS[name]


__all__ = [
    "SELECTORS",
    "Asked",
    "Asker",
    "Constrained",
    "Free",
    "Hybrid",
    "Router",
    "Selected",
    "SelectionRound",
    "Selector",
    "selector_named",
]
