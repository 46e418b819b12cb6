"""The memory bank: what stage 1 leaves of a corpus and stage 2 routes over and attends to.

Per memory layer and chunk of `chunk_size` tokens it holds one routing key and one pooled key and value; per document,
its key, text and metadata; and with what model all of it was made, because no other model can read it.
"""

import copy
import importlib
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import Tensor

from .bank_format_msa import commit_id
from .bank_reader_msa import BankReader, KnowsOrigin, read_bank
from .bank_writer_msa import write_bank
from .chunks_msa import ContextRows
from .dense_layer_msa import DenseLayer as DenseLayer
from .dense_layer_msa import own_tensor
from .document_rows_msa import ChunkLayout
from .document_table_msa import Document as Document
from .document_table_msa import DocumentTable as DocumentTable
from .fingerprint_msa import model_fingerprint as model_fingerprint
from .fingerprint_msa import tokenizer_fingerprint as tokenizer_fingerprint
from .hub_msa import bank_directory
from .origin_msa import BankOrigin as BankOrigin
from .origin_msa import check_origin
from .pushing_msa import push_bank
from .routing_msa import RoutingRequest, Scoring, Selection


@dataclass(frozen=True)
class BankHome:
    """The place that a bank was loaded from.

    Attributes:
        directory: of the bank.
        commit: its manifest's checksum then.
    """

    directory: Path
    commit: str


@runtime_checkable
class LaunchesAlone(Protocol):
    """A layer that does nothing but launch work on a device, perhaps, when it is asked: this can then be recorded."""

    def addresses(self, device: torch.device, samples: int, k: int) -> Hashable | None:
        """The addresses and sizes of all that `route` and `gather` read; the same while that does not change.

        Args:
            device: of queries and masks.
            samples: in a batch.
            k: documents of each.

        Returns:
            None where the host has a part in it.
        """


# Class -> its layers launch alone. Every prompt asks it of all layers, and a protocol takes long to say.
_launching: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def launches_alone(layer: object) -> TypeGuard[LaunchesAlone]:
    """Tell whether a layer is one that `LaunchesAlone` describes."""
    kind = type(layer)
    if kind not in _launching:
        _launching[kind] = issubclass(kind, LaunchesAlone)
    return _launching[kind]


class LayerMemory(Protocol):
    """What one memory layer keeps of the documents, wherever it lies: the layer is asked, and hands out no tensors.

    Queries and masks may lie on any device; results lie on the layer's, in tensors of the caller's own, and asking
    never waits for it where the layer can help it. Structural: a checkpoint's copy of a class may live beside the
    package's.
    """

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample; equal scores go to the lower number.

        Args:
            queries: [B, T, H, D] router queries. Where these have a gradient, so have the scores.
            mask: [B, T] bool, tokens that route; a sample without one chooses nothing.
            k: how many.
            scoring: similarity and reductions.
        """

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores [B, R] float32 of all documents, or [B, n] of `documents` [B, n] int64, -1 for none.

        `NO_SCORE` for those that a sample may not choose, and for samples without a routing token. Differentiable where
        the queries are.
        """

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of the documents of a selection, keys and values in `dtype`."""


class OpenSession:
    """A session in which there is nothing to do but to hand out the layers.

    A class of its own, because torch.compile follows no `nullcontext` that hands out something.
    """

    def __init__(self, layers: Mapping[int, LayerMemory]) -> None:
        self.layers = layers

    def __enter__(self) -> Mapping[int, LayerMemory]:
        return self.layers

    def __exit__(self, *error: object) -> None:
        pass


@runtime_checkable
class Snapshots(Protocol):
    """What a forward can take as its memory: whatever has a state that stays as it is."""

    def snapshot(self) -> "Memory":
        """The state of now, which does not change any more."""


class Memory(Protocol):
    """Documents that one model has encoded, wherever they lie.

    Attributes:
        documents: in order; with the rows in which their chunks are counted.
        origin: what the memory was made with.
        prefix: per layer of the model, keys (after RoPE) and values [G, p, D] of the template prefix.
    """

    @property
    def documents(self) -> DocumentTable: ...

    @property
    def origin(self) -> BankOrigin: ...

    @property
    def prefix(self) -> Mapping[int, tuple[Tensor, Tensor]]: ...

    def snapshot(self) -> "Memory":
        """The state of now, which does not change any more; itself where nothing ever does."""

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers, for one forward that routes, within it.

        Processes that share a memory meet where the session begins, and hear at its end whether all came through.
        """


class MemoryBank:
    """Documents, encoded once by one model, ready to be routed over and attended to.

    Args:
        layers: memory of each memory layer; C chunks in all of them, one dtype, one device.
        offsets: [R + 1] int64 on the CPU; chunks `offsets[i]` up to `offsets[i + 1]` belong to row i of `documents`,
            which is document i where none was deleted.
        prefix: per layer of the model, keys (after RoPE) and values [G, p, D] of the template prefix; may be empty
            where p is 0.
        documents: N documents in R rows.
        origin: what the bank was made with.
        counts: chunks and tokens of the documents, from who has made sure that all parts agree; they are then not
            compared.
        next_id: the first id above all that were ever given; default: above those of the documents, if these have ids.

    Attributes:
        home: where it was loaded from, None where it was not.
        indexes: what `search` uses beside the tensors, by name (`msa_hf.retrieval`).
        is_whole: its layers are tensors of all chunks.

    Raises:
        ValueError: where these contradict each other, naming what does.
    """

    is_whole = True

    def __init__(
        self,
        layers: Mapping[int, DenseLayer],
        offsets: Tensor,
        prefix: Mapping[int, tuple[Tensor, Tensor]],
        documents: DocumentTable,
        origin: BankOrigin,
        counts: tuple[int, int] | None = None,
        next_id: int | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.offsets = offsets
        self.prefix = dict(sorted(prefix.items()))
        self.documents = documents
        self.origin = origin
        self.next_id = next_id
        self.home: BankHome | None = None
        self.indexes: dict[str, Any] = {}
        self._visible: Tensor | None = None
        self._layout: ChunkLayout | None = None
        if counts is None:
            self._validate()
            visible = documents.visible_rows()
            counts = int(documents.counts("chunks")[visible].sum()), int(documents.counts("tokens")[visible].sum())
        self.num_chunks, self.num_tokens = counts

    def _validate(self) -> None:
        def require(valid: object, problem: str) -> None:
            if not valid:
                raise ValueError(problem)

        offsets, count = self.offsets, self.documents.num_rows
        on_cpu = offsets.dtype == torch.int64 and offsets.device.type == "cpu"
        require(on_cpu and offsets.shape == (count + 1,), f"`offsets` must be {count + 1} int64 numbers on the CPU.")
        chunks = self.documents.counts("chunks")
        require(offsets[0] == 0 and (offsets.diff() >= 1).all(), "`offsets` must ascend from 0, by 1 or more.")
        require((offsets.diff().numpy() == chunks).all(), "`offsets` and the documents' `chunks` differ.")
        size = self.origin.chunk_size
        for row in np.flatnonzero(chunks != -(-self.documents.counts("tokens") // size))[:1]:
            document = self.documents.row(int(row))
            raise ValueError(
                f"Document {document.key!r} has {document.tokens} tokens and {document.chunks} chunks, which does not "
                f"fit chunks of {size} tokens."
            )

        wanted = list(self.origin.memory_layers)
        require(list(self.layers) == wanted, f"`layers` are {list(self.layers)}, the origin's are {wanted}.")
        total = int(offsets[-1])
        for layer, memory in self.layers.items():
            keys, pooled_kv = memory.routing_keys, memory.pooled_kv
            fits = pooled_kv.ndim == 4 and pooled_kv.shape[:2] == (total, 2)
            fits = fits and keys.shape == (total, pooled_kv.shape[2:].numel())
            require(
                fits,
                f"Layer {layer}: for {total} chunks `pooled_kv` must be [{total}, 2, G, D] and `routing_keys` "
                f"[{total}, G * D], got {list(pooled_kv.shape)} and {list(keys.shape)}.",
            )
        length = len(self.origin.prefix_token_ids)
        missing = sorted(self.layers.keys() - self.prefix.keys())
        require(not length or not missing, f"`prefix` lacks the memory layers {missing}.")
        for layer, (keys, values) in self.prefix.items():
            fits = keys.ndim == 3 and keys.shape == values.shape and keys.shape[1] == length
            require(
                fits,
                f"`prefix` of layer {layer}: keys and values must be [G, {length}, D], "
                f"got {list(keys.shape)} and {list(values.shape)}.",
            )
        kinds = {(tensor.dtype, tensor.device) for tensor in self._tensors()}
        require(len(kinds) == 1, f"All tensors must share one dtype and one device, got {sorted(map(str, kinds))}.")
        require(self.dtype.is_floating_point, f"A bank holds floating-point numbers, got {self.dtype}.")

    def _tensors(self) -> Iterator[Tensor]:
        for memory in self.layers.values():
            yield from (memory.routing_keys, memory.pooled_kv)
        for pair in self.prefix.values():
            yield from pair

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def visible(self) -> Tensor | None:
        """[1, R] bool on the bank's device, the rows that are documents; None where all are."""
        if self._visible is None and len(self.documents.deleted):
            self._visible = torch.from_numpy(self.documents.visible_rows())[None].to(self.device)
        return self._visible

    @property
    def layout(self) -> ChunkLayout:
        """Whose the chunks are, and which documents may be chosen."""
        if self._layout is None:
            self._layout = ChunkLayout(self.offsets, self.visible)
        return self._layout

    def snapshot(self) -> "MemoryBank":
        """Itself, which does not change."""
        return self

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers, for one forward; see `Memory`."""
        layout = self.layout.renewed()
        return OpenSession({layer: memory.over(layout) for layer, memory in self.layers.items()})

    def layer(self, index: int) -> DenseLayer:
        """The memory of layer `index`.

        Raises:
            KeyError: where that is no memory layer.
        """
        if index not in self.layers:
            raise KeyError(f"layer {index} is not a memory layer; those are {list(self.layers)}")
        return self.layers[index]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of all tensors."""
        return next(self._tensors()).dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors but the offsets."""
        return next(self._tensors()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MemoryBank":
        """The bank on another device or in another dtype; itself where nothing changes."""
        layers = {layer: memory.to(device, dtype) for layer, memory in self.layers.items()}
        prefix = {
            layer: (keys.to(device, dtype), values.to(device, dtype)) for layer, (keys, values) in self.prefix.items()
        }
        if all(layers[layer] is memory for layer, memory in self.layers.items()):
            return self
        counts = self.num_chunks, self.num_tokens
        moved = MemoryBank(layers, self.offsets, prefix, self.documents, self.origin, counts, self.next_id)
        moved.home, moved.indexes = self.home, self.indexes
        return moved

    def check(self, model_origin: BankOrigin) -> None:
        """Make sure that a model can read this bank.

        Raises:
            ValueError: listing every difference, and the remedy.
        """
        check_origin(self.origin, model_origin)

    def search(self, query: str | Sequence[str], k: int = 10, mode: str = "hybrid", **options: Any) -> Any:
        """The documents that fit a query, best first, without generating; see `msa_hf.retrieval.search`.

        Args:
            query: a text, or several.
            k: hits at most.
            mode: `"router"`, `"lexical"`, `"dense"`, or `"hybrid"`.
            options: `model` and `tokenizer` for routers, `embedder`, `fusion`, ...

        Returns:
            `msa_hf.retrieval.Hit`s; a list of them for several queries.

        Raises:
            ImportError: where the package is not installed: a checkpoint's own code does not search.
        """
        try:
            module = importlib.import_module("msa_hf.retrieval")
        except ImportError as error:
            raise ImportError("Searching a bank needs the package: `pip install msa-hf`.") from error
        return module.search(self, query, k, mode, **options)

    # Copies -----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be made again, by value: another process needs no file of this bank.

        What is memory mapped is read, and stays in memory: torch lets processes share a tensor that it sends as long as
        the sender has it.
        """
        self._check_free()
        self.prefix = {layer: (own_tensor(keys), own_tensor(values)) for layer, (keys, values) in self.prefix.items()}
        self.offsets = own_tensor(self.offsets)
        return {**vars(self), "_visible": None, "_layout": None}

    def __copy__(self) -> "MemoryBank":
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> "MemoryBank":
        """Copies of the tensors; what is kept for searching never changes and is shared."""
        self._check_free()
        other = copy.copy(self)
        memo[id(self)] = other
        other.layers = {layer: memory.clone() for layer, memory in self.layers.items()}
        other.prefix = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in self.prefix.items()}
        other.offsets, other.documents = self.offsets.clone(), copy.deepcopy(self.documents, memo)
        other.indexes, other._visible, other._layout = dict(self.indexes), None, None
        return other

    def _check_free(self) -> None:
        if not self.is_whole:
            raise TypeError(
                f"A {type(self).__name__} is tied to the devices and processes that it was placed in, and cannot be "
                "pickled or copied: send the bank that it was made from, or the directory, and place that there."
            )

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str = "4GB", sole_writer: bool = False
    ) -> None:
        """Save to a directory, all or nothing. A bank that lies there is replaced; whoever has it loaded keeps it.

        If it raises, or is interrupted, the directory has the bank before or this one, as a whole.

        Args:
            directory: made where missing.
            max_shard_size: most bytes of tensors per file; a document is never split.
            sole_writer: for a file system without locks: you vouch that nothing else writes to the directory, and no
                lock is asked for.

        Raises:
            BankLocked: where a writer has the directory open, as a `BankStore` does, naming it.
            BankNotWritable: where the file system of the directory has no locks, naming it.
            ValueError: for a dtype or metadata that the format cannot hold, or a directory whose manifest is not
                readable.
            ImportError: where pyarrow is missing.
        """
        layers = {layer: (memory.routing_keys, memory.pooled_kv) for layer, memory in self.layers.items()}
        if len(self.documents.deleted):  # a copy, without them
            visible = torch.from_numpy(self.documents.visible_rows())
            chunks = visible.repeat_interleave(self.offsets.diff()).nonzero()[:, 0].to(self.device)
            layers = {layer: (keys[chunks], pooled_kv[chunks]) for layer, (keys, pooled_kv) in layers.items()}
        table, origin, ids = self.documents.to_arrow(), self.origin.to_manifest(), self.documents.ids()
        next_id = max(self.next_id or 0, 0 if ids is None or not len(ids) else int(ids.max()) + 1)
        write_bank(Path(directory), origin, layers, self.prefix, table, max_shard_size, next_id, sole_writer)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        model_id: str | None = None,
        license: str | None = None,
        max_shard_size: int | str = "4GB",
    ) -> CommitInfo:
        """Put the bank on the Hub, as a dataset with a card; one that lies there is replaced, in one commit.

        What is sent was saved to a temporary directory before: deleted documents are in no file of it. Earlier commits
        on the Hub keep what they had.

        Args:
            repo_id: `"user/bank"`; made where missing.
            private: of a repository that is made; None: the Hub's default, which is public for most users. Texts of
                documents are in the files.
            revision: a branch, made where missing. Default: main.
            commit_message: default "Upload memory bank".
            token: default that of `hf auth login`, or of the variable HF_TOKEN.
            model_id: the name of the model that reads the bank, for the card.
            license: of the documents, as the Hub writes it, for the card. None: left to be filled in.
            max_shard_size: as of `save_pretrained`.

        Raises:
            BankUnavailable: where the Hub refuses or cannot be reached, with the remedy.
            OSError: where the temporary directory has no room.
        """
        return push_bank(
            self,
            repo_id,
            private=private,
            revision=revision,
            message=commit_message or "Upload memory bank",
            token=token,
            model_id=model_id,
            license=license,
            max_shard_size=max_shard_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        model: KnowsOrigin | None = None,
        tokenizer: object = None,
        device: torch.device | str | None = None,
        verify: bool = True,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "MemoryBank":
        """Load a bank; texts, and on the CPU most tensors, stay memory mapped.

        Args:
            directory: where `save_pretrained` put it; or `"user/bank"`, where `push_to_hub` did: a text that is no path
                here is a dataset on the Hub, and comes into its cache.
            model: the model that is to read the bank; its `memory_origin(tokenizer)` is compared with the bank's origin
                before anything is loaded. None: not compared.
            tokenizer: compared as well where given.
            device: where the tensors go. Default: the CPU.
            verify: compare the SHA-256 of every file, which reads all of them. Sizes, shapes and counts are always
                checked; turn this off only for files that you wrote yourself.
            revision, token, cache_dir, local_files_only, force_download: of a bank on the Hub; see `bank_directory`.

        Raises:
            BankFormatError: where the directory is no bank or a damaged one, naming file, cause and remedy.
            BankUnavailable: where the Hub has no such bank, or cannot be reached and the cache has no copy.
            ValueError: where another model made it, listing every difference.
            ImportError: where pyarrow is missing.
        """
        found = bank_directory(
            directory,
            model,
            tokenizer,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        # With its index: safetensors takes a bare "cuda" for the first device, torch for the current one.
        target = torch.empty(0, device=device or "cpu").device
        return read_bank(found, model, tokenizer, verify, lambda reader: cls._read(reader, target))

    @classmethod
    def _read(cls, reader: BankReader, device: torch.device) -> "MemoryBank":
        rows = reader.rows()
        reader.check_side_files()
        layers = {layer: DenseLayer(*pair) for layer, pair in reader.tensors(device).items()}
        prefix = reader.prefix(device)
        with reader.contradictions():
            documents = DocumentTable(rows.table, rows.deleted)
            bank = cls(layers, rows.offsets, prefix, documents, reader.origin, next_id=rows.next_id)
        bank.home = BankHome(reader.directory, commit_id(reader.manifest))
        return bank

    def __repr__(self) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())
        return (
            f"MemoryBank(documents={len(self)}, tokens={self.num_tokens}, chunks={self.num_chunks}, "
            f"layers={list(self.layers)}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device}, "
            f"bytes={size})"
        )
