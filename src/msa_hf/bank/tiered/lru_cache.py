"""Content of the documents that were used last, kept on the device beside slower memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

Parts = tuple[Tensor, ...]  # what is kept of a document: content [c, 2, G, D], and scales [c, 2] where it has some


class DocumentLRU:
    """The documents of one layer that were used last, up to a number of bytes.

    Which documents are here is known to the host, so a lookup has to wait for the device that chose them.

    Args:
        budget: bytes; a document that is larger is not kept.

    Attributes:
        hits, misses: documents that were found here, and that were not.
        bytes: that are kept now.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.hits = self.misses = self.bytes = 0
        self._kept: OrderedDict[int, Parts] = OrderedDict()  # the one used last comes last
        self._mutex = threading.Lock()

    def take(self, documents: Sequence[int], fetch: Callable[[list[int]], list[Parts]]) -> list[Parts]:
        """Take what is kept of some distinct documents, each; `fetch` brings those that are not here to the device."""
        with self._mutex:
            found = {document: self._kept[document] for document in documents if document in self._kept}
            missing = [document for document in documents if document not in found]
            for document in found:
                self._kept.move_to_end(document)
            fetched = dict(zip(missing, fetch(missing), strict=True)) if missing else {}
            self.hits += len(found)
            self.misses += len(missing)
            for document, parts in fetched.items():
                self._keep(document, parts)
            return [found[document] if document in found else fetched[document] for document in documents]

    def _keep(self, document: int, parts: Parts) -> None:
        size = sum(part.nbytes for part in parts)
        if size > self.budget:
            return
        while self.bytes + size > self.budget:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in oldest)
        # Copies: what was fetched is one piece of memory for all documents.
        self._kept[document] = tuple(part.clone() for part in parts)
        self.bytes += size
