"""Memory Parallel: a bank whose documents lie in several processes, each of which runs the whole model.

Every process has a share of the documents, a run of them that follow each other: their routing keys and their content.
The table of documents is everywhere. In a layer each process scores its own documents, one exchange of the `k` best
tells all of them the same best of all, and one exchange of content gives everyone the rows of those; or every process
reads them itself, where all have all content. Neither waits for the device: numbers of rows are bounded by what the
bank's longest documents have.

Processes talk twice more per forward that routes, by messages of the hosts. One is on its way from where the forward
begins to its first memory layer; by it they agree on what it is. After it they hear whether all came through.
Generating a token exchanges nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...model.bank_format_msa import commit_id
from ...model.bank_reader_msa import BankReader, KnowsOrigin, read_bank
from ...model.hub_msa import bank_directory
from ...model.memory_msa import DenseLayer, DocumentTable, MemoryBank, Snapshots
from ...model.routing_msa import RoutingRequest
from ..store.store import BankStore
from .agreement import DIFFERENT, SAME
from .collectives import Collectives, RankFailed
from .layer import ReplicatedLayer, ShardedLayer
from .session import ShardSession
from .share import Share, shares

TIMEOUT = timedelta(minutes=10)
# Where content lies -> the layers of it.
SHARDED = "sharded"
CONTENT: dict[str, type[ShardedLayer]] = {SHARDED: ShardedLayer, "replicated": ReplicatedLayer}


class ShardedBank(MemoryBank):
    """A bank whose documents lie in several processes; `shard_bank` makes one.

    `model.forward`, `generate` and `MemoryInterleave` take it as they take any bank. `documents`, `offsets` and
    `prefix` are those of the whole bank, `layers` hold this process' chunks alone; of replicated content all.

    Use it in a `with` block: at its end a process waits for the others, and serves their questions meanwhile; an error
    inside reaches all of them.

    Attributes:
        share: what lies here.
        inputs: whether all processes give the model the same inputs, `"same"`, or `"different"` ones.
        content: whether each process has that of its own documents, `"sharded"`, or all of it, `"replicated"`.
    """

    is_whole = False

    def __init__(
        self,
        layers: dict[int, DenseLayer],
        whole: MemoryBank,
        rows: list[int],
        ranks: Collectives,
        inputs: str,
        content: str = SHARDED,
    ) -> None:
        counts = whole.num_chunks, whole.num_tokens
        super().__init__(layers, whole.offsets, whole.prefix, whole.documents, whole.origin, counts, whole.next_id)
        self.share = Share(whole.offsets, rows, ranks.rank)
        self.inputs = inputs
        self.content = content
        self._ranks = ranks

    @property
    def rank(self) -> int:
        """This process' number."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self._ranks.size

    @property
    def rows(self) -> list[int]:
        """[W + 1], first row of each process' documents, and the end."""
        return self.share.rows

    @property
    def own_rows(self) -> slice:
        """The rows of `documents` that lie here."""
        return self.share.own_rows

    @property
    def own_chunks(self) -> tuple[int, int]:
        """First and end of the chunks that lie here."""
        return self.share.own_chunks

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ShardedBank:
        """This process' part on another device or in another dtype."""
        moved = copy.copy(self)
        move = CONTENT[self.content].moved
        moved.layers = {layer: move(memory, device, dtype) for layer, memory in self.layers.items()}
        moved.prefix = {
            layer: (keys.to(device, dtype), values.to(device, dtype)) for layer, (keys, values) in self.prefix.items()
        }
        moved._visible = moved._layout = None
        return moved

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str = "4GB", sole_writer: bool = False
    ) -> None:
        """Not of a part: save the whole bank."""
        raise ValueError("This process holds a part of the bank; save the whole one before it is shared.")

    @contextmanager
    def session(self, request: RoutingRequest) -> Iterator[Mapping[int, ShardedLayer]]:
        """The layers, for one forward of all processes; see `Memory`.

        Raises:
            ValueError: where scores would need a gradient, or all processes together make no sense.
            RankFailed: where another process failed.
        """
        all_scores = request.all_scores or not request.scoring.has_operation
        if torch.is_grad_enabled() and (request.score_bias or all_scores or request.documents is not None):
            raise ValueError(
                "Scores of documents in other processes carry no gradient: call the model under `torch.no_grad()`."
            )
        with ShardSession(self.share, self.layout, self._ranks, self.inputs, request) as session:
            yield self._layers(session)

    def _layers(self, session: ShardSession) -> dict[int, ShardedLayer]:
        return {layer: CONTENT[self.content](part, session) for layer, part in self.layers.items()}

    def finish(self) -> None:
        """Wait until all processes are through, doing this one's part of what they ask meanwhile, and disconnect.

        Raises:
            RankFailed: where another process failed.
            ValueError: with `inputs="same"`, where another one goes on.
        """
        while not self._ranks.closed:
            session = ShardSession(self.share, self.layout, self._ranks, self.inputs, None)
            if not session.active:
                break
            with session:
                for layer in self._layers(session).values():
                    layer.serve(self.origin.similarity)
        self._ranks.part()

    def __enter__(self) -> ShardedBank:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
        except BaseException as failed:
            error = failed
            raise
        finally:
            if error is not None:
                self._ranks.fail(error)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, rank={self.rank} of {self.size})"


# Sharing a bank -------------------------------------------------------------------------------------------------------


def shard_bank(
    bank: str | PathLike[str] | MemoryBank | BankStore,
    group: dist.ProcessGroup | None = None,
    *,
    inputs: str = SAME,
    content: str = SHARDED,
    timeout: timedelta = TIMEOUT,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> ShardedBank:
    """Share a bank among the processes of `torch.distributed`; all of them call this.

    Args:
        bank: the whole bank, the same in all processes, of which each keeps its part; or a directory, of whose tensors
            each reads its part alone.
        group: the processes that share it; default all.
        inputs: `"same"`: all processes give the model the same inputs, and split the work of each forward.
            `"different"`: each has its own; any numbers of samples, of tokens and of forwards.
        content: `"sharded"`: each process has that of its own documents, and content is exchanged. `"replicated"`:
            every process has a whole bank, whose content it reads where it lies; only routing keys are shared out.
            `host_bank` puts a directory into host memory once for all processes of a host.
        timeout: how long a process waits for another, in any exchange and while that one does something else.
        model, tokenizer: as `MemoryBank.from_pretrained`; for a directory.
        device: where this process' part goes. Default: where the bank lies; for a directory, the model's device.
        verify: as `MemoryBank.from_pretrained`; a process looks at the files that it reads.

    Returns:
        A `ShardedBank`, to be used in a `with` block.

    Raises:
        TypeError: for what is no bank.
        ValueError: for a bank that is shared or placed already, where the processes have different banks, and what
            `MemoryBank.from_pretrained` raises; in all of them, if one has to.
        RankFailed: where another process failed.
        RuntimeError: where the processes are not connected.
    """
    ranks = Collectives(group, timeout)  # before all that may be wrong in one process alone: the others hear of it
    error: Exception | None = None
    shared: ShardedBank | None = None
    digest = ""
    try:
        _check_arguments(bank, inputs, content)
        if isinstance(bank, str | PathLike):
            if device is None and model is not None:
                device = model.device
            shared, commit = _read(
                bank_directory(fspath(bank), model, tokenizer), ranks, inputs, model, tokenizer, device, verify
            )
        else:
            shared, commit = _part(bank.snapshot(), ranks, inputs, content, device), ""
        digest = _digest(shared, commit)
    except Exception as failed:  # raised below, after the others know
        error = failed
    states = ranks.everyone(
        (digest, f"{inputs} {content}", None if error is None else f"{type(error).__name__}: {error}")
    )
    if error is not None:
        ranks.part()
        raise error
    problem = next((f"Process {rank}: {text}" for rank, (*_, text) in enumerate(states) if text is not None), None)
    if problem is not None:
        ranks.part()
        raise RankFailed(problem)
    if len(set(states)) > 1:
        ranks.part()
        raise ValueError(
            "The processes have different banks, or differ in `inputs` or `content`; all must share the same one."
        )
    assert shared is not None
    return shared


def _check_arguments(bank: object, inputs: str, content: str) -> None:
    if inputs not in (SAME, DIFFERENT):
        raise ValueError(f'`inputs` must be "same" or "different", got {inputs!r}.')
    if content not in CONTENT:
        raise ValueError(f"`content` must be one of {tuple(CONTENT)}, got {content!r}.")
    if content != SHARDED and isinstance(bank, str | PathLike):
        raise ValueError(
            f"Of a directory each process reads a part: for {content} content pass `host_bank(directory)`."
        )
    if not isinstance(bank, str | PathLike | Snapshots):
        raise TypeError(f"`bank` must be a MemoryBank, a BankStore or a directory, got {type(bank).__name__}.")


def _part(
    bank: MemoryBank, ranks: Collectives, inputs: str, content: str, device: torch.device | str | None
) -> ShardedBank:
    if not bank.is_whole:
        raise ValueError(f"A {type(bank).__name__} is shared or placed already; share the bank that it was made from.")
    rows = shares(bank.offsets, ranks.size)
    first, end = int(bank.offsets[rows[ranks.rank]]), int(bank.offsets[rows[ranks.rank + 1]])
    target = bank.device if device is None else torch.empty(0, device=device).device
    layers = {}
    for layer, memory in bank.layers.items():
        # Copies, so that the whole can be let go of.
        keys, pooled_kv = memory.routing_keys[first:end].to(target, copy=True), memory.pooled_kv
        layers[layer] = DenseLayer(
            keys, pooled_kv[first:end].to(target, copy=True) if content == SHARDED else pooled_kv
        )
    shared = ShardedBank(layers, bank, rows, ranks, inputs, content)
    return shared if target == bank.device else shared.to(target)


def _read(
    directory: Path,
    ranks: Collectives,
    inputs: str,
    model: KnowsOrigin | None,
    tokenizer: object,
    device: torch.device | str | None,
    verify: bool,
) -> tuple[ShardedBank, str]:
    """This process' part of a bank, and the commit that it is of."""
    target = torch.empty(0, device=device or "cpu").device
    return read_bank(directory, model, tokenizer, verify, lambda reader: _read_share(reader, ranks, inputs, target))


def _read_share(reader: BankReader, ranks: Collectives, inputs: str, target: torch.device) -> tuple[ShardedBank, str]:
    found = reader.rows()
    with reader.contradictions():
        documents = DocumentTable(found.table, found.deleted)
    rows = shares(found.offsets, ranks.size)
    first, end = int(found.offsets[rows[ranks.rank]]), int(found.offsets[rows[ranks.rank + 1]])
    prefix = reader.prefix(target)
    layers = {layer: DenseLayer(*pair) for layer, pair in reader.tensors(target, first, end).items()}
    visible = documents.visible_rows()
    counts = int(documents.counts("chunks")[visible].sum()), int(documents.counts("tokens")[visible].sum())
    whole = MemoryBank(layers, found.offsets, prefix, documents, reader.origin, counts, found.next_id)
    return ShardedBank(layers, whole, rows, ranks, inputs), commit_id(reader.manifest)


def _digest(bank: ShardedBank, commit: str) -> str:
    """The common side of the parts of one bank, read of a commit."""
    digest = hashlib.sha256(json.dumps([commit, bank.origin.to_dict()], sort_keys=True).encode())
    digest.update(bank.offsets.numpy().tobytes() + bank.documents.deleted.tobytes() + str(bank.dtype).encode())
    step = max(len(bank.documents) // 64, 1)
    for position in range(0, len(bank.documents), step):
        digest.update(bank.documents[position].key.encode() + b"\0")
    return digest.hexdigest()
