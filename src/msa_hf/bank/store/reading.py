"""A bank as its last commit left it: opened, looked up, snapshotted and verified. `store.py` changes it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ...model.bank_files_msa import damage_of_file
from ...model.bank_format_msa import MANIFEST, BankFormatError, TensorPair, data_files
from ...model.bank_lock_msa import missing_commit, noted_commit
from ...model.bank_log_msa import entry_name
from ...model.bank_manifest_msa import TRIES, read_manifest
from ...model.bank_reader_msa import BankReader, read_bank
from ...model.given_documents_msa import key_of
from ...model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, LayerMemory, MemoryBank
from ...model.routing_msa import RoutingRequest
from ...retrieval.followers import Followers
from ...retrieval.rows import rows_of_state
from .buffers import Buffers
from .deleted_keys import DeletedKeys
from .encoder import DocumentEncoder, EncodingModel
from .errors import BankDamaged
from .open import read_contents
from .segments import Damage, Segment
from .state import BankStat, State
from .verify import find_damage

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

    from ...generation.protocol import PromptProtocol

logger = logging.getLogger(__name__)


class CommittedBank:
    """The part of a `BankStore` that reads: everything here leaves the directory as it is.

    Args:
        model, directory, tokenizer, protocol, read_only: as of `BankStore`.
        device: of snapshots.
        encoder: of the prefix, where its file is damaged; None without a model.
    """

    state: State
    origin: BankOrigin
    _followers: Followers
    _prefix: dict[int, TensorPair] | None  # None: damaged, and no model to make it again

    def __init__(
        self,
        model: EncodingModel | None,
        directory: Path | None,
        tokenizer: PreTrainedTokenizerBase | None,
        protocol: PromptProtocol | None,
        read_only: bool,
        device: torch.device,
        encoder: DocumentEncoder | None,
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.directory, self.read_only, self.device = directory, read_only, device
        self._encoder = encoder
        self._mutex = threading.RLock()
        self._buffers: Buffers | None = None
        self._snapshot: MemoryBank | None = None
        self._deleted_keys = DeletedKeys()
        self._verified: set[str] = set()  # tables that were compared with their SHA-256
        self._opened: tuple[Segment, ...] = ()
        self._damage: dict[str, Damage] = {}

    # Opening ----------------------------------------------------------------------------------------------------------

    def _load(self, verify: bool = False) -> None:
        """Open the bank as it lies in the directory now, keeping what is open already.

        Args:
            verify: compare what decides about keys, versions and ids with its SHA-256.
        """
        assert self.directory is not None
        read_bank(
            self.directory, self.model, self.tokenizer, False, lambda reader: self._read(replace(reader, verify=verify))
        )

    def _read(self, reader: BankReader) -> None:
        contents = read_contents(reader, self._opened, self.device)
        prefix = contents.prefix
        if prefix is None and self._encoder is not None:
            prefix = self._encoder.prefix(reader.layout.dtype)
        self.origin, self._prefix, self._deleted_keys = reader.origin, prefix, contents.keys
        self._adopt(State.of(contents.manifest, contents.segments, contents.deleted))
        self._note(contents.damage)

    def _adopt(self, state: State) -> None:
        """Make this the current state."""
        self.state = state
        self._opened = state.segments
        self._snapshot = None

    def _note(self, damage: list[Damage]) -> None:
        """Say once what is damaged."""
        for item in damage:
            if item.file not in self._damage:
                self._damage[item.file] = item
                left_out = f"{item.documents} documents are left out" if item.documents else "no document is lost"
                logger.warning("%s: %s; %s.", self.directory, item.cause.rstrip("."), left_out)

    def _follow(self) -> None:
        """Tell what is kept beside the bank of the commit that the bank is at now."""
        self._followers.follow(rows_of_state(self.state, self.directory))

    # Reading ----------------------------------------------------------------------------------------------------------

    def snapshot(self) -> MemoryBank:
        """The bank as it is now, for good: later commits do not change it. `generate(memory=...)` takes it.

        If it was opened to read and a writer has removed files of the state it was at, it moves on to the last commit.
        """
        with self._mutex:
            for attempt in range(TRIES):
                try:
                    if self._snapshot is None:
                        self._snapshot = self._new_snapshot()
                    return self._snapshot
                except BankFormatError:
                    if attempt + 1 == TRIES or not self.refresh():
                        raise
            raise AssertionError

    def _new_snapshot(self) -> MemoryBank:
        state = self.state
        if self._buffers is None:
            starts = state.offsets[state.starts].tolist()
            segments = dict(zip(starts, state.segments, strict=True))
            self._buffers = Buffers.load(segments, state.layout, state.all_chunks, self.device)
        layers = {layer: DenseLayer(*pair) for layer, pair in self._buffers.view(state.all_chunks).items()}
        documents = DocumentTable(state.table, state.hidden, state.find)
        offsets, counts = torch.from_numpy(state.offsets), (state.chunks, state.tokens)
        next_id = state.manifest["next_id"]
        bank = MemoryBank(layers, offsets, self.whole_prefix(), documents, self.origin, counts, next_id)
        bank.home, bank.indexes = self._followers.home, self._followers.searchers()
        return bank

    @property
    def documents(self) -> DocumentTable:
        """The documents of now; their tensors are not read."""
        state = self.state  # once: another thread may commit meanwhile
        return DocumentTable(state.table, state.hidden, state.find)

    @property
    def prefix(self) -> dict[int, TensorPair]:
        """Keys and values of the template prefix; see `MemoryBank`."""
        return self.whole_prefix()

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers of the state of now, for one forward; see `Memory`."""
        return self.snapshot().session(request)

    def whole_prefix(self) -> dict[int, TensorPair]:
        """Keys and values of the template prefix, per layer.

        Raises:
            BankDamaged: if its file is damaged and there is no model to make it again.
        """
        if self._prefix is None:
            raise BankDamaged(
                "The file of the template prefix is damaged: open the bank with its model, which makes it."
            )
        return self._prefix

    def search(self, query: str | Sequence[str], k: int = 10, mode: str = "hybrid", **options: Any) -> Any:
        """`MemoryBank.search` in the bank as it is now, with its own model, tokenizer, protocol and embedder."""
        own = {"model": self.model, "tokenizer": self.tokenizer, "protocol": self.protocol}
        return self.snapshot().search(query, k, mode, **{**own, **options})

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Put the bank as it is now on the Hub; see `MemoryBank.push_to_hub`."""
        return self.snapshot().push_to_hub(repo_id, **options)

    def refresh(self) -> bool:
        """Move on to the last commit of another process; returns whether there was one."""
        with self._mutex:
            if self.directory is None or not self.read_only:
                return False
            if read_manifest(self.directory)["checksum"] == self.state.manifest.get("checksum"):
                return False
            old = self.state
            self._load()
            self._keep_buffers(old)
            self._follow()
            return True

    def _keep_buffers(self, old: State) -> None:
        """Append to the tensors in memory what is new since a state; if rows were moved, they are read again."""
        if self._buffers is not None and not self._buffers.follow(old, self.state):
            self._buffers = None

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, key: str) -> bool:
        return self._find(key_of(key))[1] is not None

    def get(self, key: str) -> Document | None:
        """The document named `key` as it was last committed, None if there is none.

        Raises:
            BankDamaged: if a table that may hold the document is damaged.
            TypeError, ValueError: for what is no key.
        """
        state, row = self._find(key_of(key))
        return None if row is None else DocumentTable(state.table, find=state.find).row(row)

    def _find(self, key: str) -> tuple[State, int | None]:
        """The state of now, and the row that a key has in it: another thread may commit, and move rows, meanwhile.

        That there is none is never said from bytes that were not verified. If a writer has removed files of the state
        of a bank that was opened to read, it moves on to the last commit.
        """
        for attempt in range(TRIES):
            state = self.state
            row = state.find(key)
            if row is not None or self.directory is None:
                return state, row
            if state.may_have_lost(key):
                raise BankDamaged(f"{key!r} may be the key of a document in damaged files ({self._damaged_files()}).")
            try:
                self._verify_tables(state)
            except BankDamaged:
                if attempt + 1 == TRIES or not self.refresh():
                    raise
            else:
                return state, None
        raise AssertionError

    def _damaged_files(self) -> str:
        return ", ".join(sorted(self._damage))

    def _verify_tables(self, state: State) -> None:
        """Compare the tables of a bank that was opened to read with their SHA-256, each of them once."""
        assert self.directory is not None
        if not self.read_only:
            return  # it was opened with that
        for segment in state.segments:
            record = segment.record["table"]
            if record["file"] not in self._verified and not segment.lost.all():
                if (cause := damage_of_file(self.directory, record)) is not None:
                    raise BankDamaged(f"{cause} Whether the document is there is not known.")
                self._verified.add(record["file"])

    @property
    def generation(self) -> int:
        """Commits that led here."""
        return self.state.manifest["generation"]

    def stat(self) -> BankStat:
        """Numbers about the bank."""
        state = self.state
        files = [] if self.directory is None else data_files(state.manifest)
        return {
            "documents": len(state),
            "deleted": len(state.deleted),
            "damaged": len(state.hidden) - len(state.deleted),
            "chunks": state.chunks,
            "tokens": state.tokens,
            "segments": len(state.segments),
            "generation": state.manifest["generation"],
            "next_id": state.manifest["next_id"],
            "remembered_deletions": len(self._deleted_keys),
            "bytes": sum(entry["bytes"] for entry in files),
            "indexes": self._followers.describe(),
        }

    def verify(self) -> list[Damage]:
        """Read every file and compare it with its SHA-256; returns what is damaged, an empty list where nothing is.

        Documents of damaged files are left out from now on; the others stay usable. Before the bank can be written to
        again, the files must be restored, or the documents given up with `discard_damaged()`. Indexes for searching are
        made anew when the bank is opened to write.
        """
        with self._mutex:
            if self.directory is None:
                return []
            found: list[Damage] = []
            noted = noted_commit(self.directory)  # before what it is compared with
            try:
                read_manifest(self.directory)
            except BankFormatError as error:
                found.append(Damage(MANIFEST, str(error), tuple(self.state.table["key"].to_pylist())))
            else:
                self.refresh()
            state = self.state
            found += find_damage(self.directory, state, self._damage)
            found += [Damage(file, cause) for file, cause in self._followers.damaged_files().items()]
            if found:
                self._note(found)
                self._buffers = None
                self._adopt(State.of(state.manifest, state.segments, state.deleted))
            lineage = state.manifest.get("lineage")
            if cause := missing_commit(self.directory, lineage, self.generation, noted):
                found.append(Damage(entry_name(self.generation + 1), cause))
            return found

    def __reduce__(self) -> NoReturn:
        other = "" if self.directory is None else f", or the directory {str(self.directory)!r}, to open it there"
        raise TypeError(
            "A BankStore holds open files and the right to write, and cannot be pickled or copied: pass "
            f"`store.snapshot()`, which can be{other}."
        )

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        return f"BankStore({where}, documents={len(self)}, tokens={self.state.tokens}, generation={self.generation})"
