"""A bank in the memory of a host, once for all processes that work there.

    bank = host_bank("my-bank", model=model, tokenizer=tokenizer)
    memory = place_bank(bank, model.device, model=model)  # each process answers its own questions
    memory = shard_bank(bank, content="replicated", device=model.device)  # or they share the routing of each

The processes of a host fill a part each of the same blocks of memory, which all of them map. It has no
name in a file system: it is gone with the last process that uses it, however that one ends. Each locks what it maps for
its GPU, which reads content there directly.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from datetime import timedelta
from os import PathLike, fspath
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.bank_format_msa import commit_id
from ..model.bank_manifest_msa import TRIES
from ..model.bank_reader_msa import BankReader, KnowsOrigin, open_bank
from ..model.hub_msa import bank_directory
from ..model.memory_msa import BankHome, DenseLayer, DocumentTable, MemoryBank
from .host_memory import HostMemory
from .sharded.bank import TIMEOUT
from .sharded.collectives import Collectives, agreed
from .sharded.share import shares

ALIGNMENT = 256  # bytes, of every tensor


def host_bank(
    directory: str | PathLike[str],
    group: dist.ProcessGroup | None = None,
    *,
    model: KnowsOrigin | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
    timeout: timedelta = TIMEOUT,
) -> MemoryBank:
    """Read a bank into the memory of each host, once for all of its processes; all of them call this. Linux only.

    Args:
        directory: of the bank, or its name on the Hub.
        group: the processes; default all, and one where torch.distributed is not connected.
        model, tokenizer, verify: as `MemoryBank.from_pretrained`; a process looks at the files that it reads.
        device: the GPU that is to read content, for which it is locked; nothing is locked for the CPU (default: the
            CPU).
        timeout: how long a process waits for another, such as for the part that it reads.

    Returns:
        A bank on the CPU. Its tensors are the same memory in all processes of a host: nobody must write to them.

    Raises:
        RankFailed: where another process failed.
        MemoryError: where the system does not lock so much.
        OSError: where a process cannot reach the memory of another one on its host, or the system has no such memory.
        ValueError: what `MemoryBank.from_pretrained` raises, and where processes find different banks.
    """
    ranks = Collectives(group, timeout)  # before all that may be wrong in one process alone: the others hear of it
    try:
        if not hasattr(os, "memfd_create"):
            raise OSError("Processes share memory without a name in a file system on Linux alone.")
        target = torch.empty(0, device=device or "cpu").device
        place = bank_directory(fspath(directory), model, tokenizer)
        bank = _read(_opened_alike(ranks, lambda: open_bank(place, model, tokenizer, verify)), ranks, target)
        ranks.part()
        return bank
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.close()


def _opened_alike(ranks: Collectives, look: Callable[[], BankReader]) -> BankReader:
    """The bank in one state for all processes, which look again where a writer came between them."""
    for _ in range(TRIES):
        reader = look()
        if len(set(ranks.everyone(reader.manifest["checksum"]))) == 1:
            return reader
    raise ValueError(
        f"The processes find different banks in {reader.directory}. Give all of them the same one, on every host; "
        "where somebody writes to it all the time, wait until that is done."
    )


def _read(reader: BankReader, ranks: Collectives, target: torch.device) -> MemoryBank:
    rows, layout = reader.rows(), reader.layout
    reader.check_side_files()
    chunks = int(rows.offsets[-1])
    empty = {layer: layout.empty(layer, 0, torch.device("cpu")) for layer in layout.shapes}
    layers = {layer: DenseLayer(*pair) for layer, pair in empty.items()}
    if chunks:
        neighbors = neighbors_of(ranks)
        # Routing keys apart from content: who has put them on a device lets go of them here.
        shapes = [[(chunks, *pair[kind].shape[1:]) for pair in empty.values()] for kind in (0, 1)]
        memory = shared_blocks([_bytes_of(kind, layout.dtype) for kind in shapes], neighbors, ranks)
        tensors = [_tensors(block, kind, layout.dtype) for block, kind in zip(memory, shapes, strict=True)]
        layers = {layer: DenseLayer(*pair) for layer, pair in zip(empty, zip(*tensors, strict=True), strict=True)}
        with agreed(ranks):
            cuts = shares(rows.offsets, len(neighbors))
            place = neighbors.index(ranks.rank)
            _fill(layers, reader, int(rows.offsets[cuts[place]]), int(rows.offsets[cuts[place + 1]]))
            if target.type == "cuda":
                for block in memory:
                    block.lock()
    prefix = reader.prefix(torch.device("cpu"))
    with reader.contradictions():
        documents = DocumentTable(rows.table, rows.deleted)
        bank = MemoryBank(layers, rows.offsets, prefix, documents, reader.origin, next_id=rows.next_id)
    bank.home = BankHome(reader.directory, commit_id(reader.manifest))
    return bank


def _fill(layers: dict[int, DenseLayer], reader: BankReader, first: int, end: int) -> None:
    """Read the chunks [first, end) into their places, one layer of one file after the other."""
    for shard in reader.shards("cpu", first, end):
        low, high = max(shard.first, first), min(shard.end, end)
        for layer in shard.layers:
            keys, pooled_kv = shard.tensors(layer, low, high)
            layers[layer].routing_keys[low:high] = keys
            layers[layer].pooled_kv[low:high] = pooled_kv


def shared_blocks(sizes: list[int], neighbors: list[int], ranks: Collectives) -> list[HostMemory]:
    """Blocks of so many bytes, the same for all `neighbors` of a host; the first of these makes them."""
    first, files = neighbors[0], list[int]()
    try:
        with agreed(ranks):
            if first == ranks.rank:
                for size in sizes:
                    files.append(os.memfd_create("msa-hf bank"))
                    os.ftruncate(files[-1], size)
        process, numbers = ranks.everyone((os.getpid(), files))[first]
        with agreed(ranks):  # who made them keeps them open until all have
            if first != ranks.rank:
                files.extend(_opened(process, number) for number in numbers)
            return [HostMemory(size, file) for size, file in zip(sizes, files, strict=True)]
    finally:
        for file in files:
            os.close(file)


def _opened(process: int, number: int) -> int:
    """A descriptor of a file that another process of this host has open under a number."""
    try:
        return os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The memory of process {process} on this host is out of reach ({error.strerror}): run all processes as "
            "the same user, in the same container",
        ) from error


def neighbors_of(ranks: Collectives) -> list[int]:
    """The processes on the host of this one, ascending: where the same kernel runs, and they see each other."""
    host = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return [rank for rank, other in enumerate(ranks.everyone(host)) if other == host]


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor, up to where the next one begins."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _bytes_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of tensors of these shapes, one after the other."""
    return sum(_padded(shape, dtype) for shape in shapes)


def _tensors(block: HostMemory, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of these shapes, one after the other."""
    starts = itertools.accumulate((_padded(shape, dtype) for shape in shapes), initial=0)
    return [block.tensor(shape, dtype, start) for shape, start in zip(shapes, starts, strict=False)]
