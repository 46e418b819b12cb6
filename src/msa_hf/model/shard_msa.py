"""A shard: tensors of a run of chunks in one file, whose header was checked."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from .bank_files_msa import unreadable
from .bank_format_msa import DTYPES, ShardRecord, TensorLayout, TensorPair, brief, format_error
from .bounds_msa import check_header
from .open_files_msa import TensorFile


@dataclass
class Shard:
    """Tensors of a run of chunks, in one file whose header was checked.

    Attributes:
        first, end: the chunks; of the segment or of the bank, as whoever opened it counts.
        layers: that it holds.
        file: None if it is damaged.
    """

    first: int
    end: int
    layers: list[int]
    file: TensorFile | None

    def tensors(self, layer: int, first: int | None = None, end: int | None = None) -> TensorPair:
        """Routing keys and content of a layer, memory mapped on the CPU; or a copy of chunks [first, end) of them.

        Raises:
            BankFormatError: if a writer has removed the file meanwhile.
        """
        if self.file is None:
            raise ValueError("A damaged shard has no tensors.")
        names = f"layers.{layer}.routing_keys", f"layers.{layer}.content"
        low, high = self.first if first is None else first, self.end if end is None else end
        try:
            file = self.file.open()
            if (low, high) == (self.first, self.end):
                return file.get_tensor(names[0]), file.get_tensor(names[1])
            keys, content = (file.get_slice(name)[low - self.first : high - self.first] for name in names)
            return keys, content
        except OSError as error:
            raise unreadable(self.file.path, error) from error


def shard_layers(record: ShardRecord, layout: TensorLayout) -> list[int]:
    """The memory layers that a shard holds: one, or all."""
    return [record["layer"]] if "layer" in record else list(layout.shapes)


def tensor_shapes(file: TensorFile, names: set[str], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file that must hold exactly `names`, all of `dtype`; it stays open."""
    path = file.path
    try:
        check_header(path, len(names))
        opened = file.open()
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise format_error(path, f"not a valid safetensors file ({error})") from error
    if found.keys() != names:
        raise format_error(path, f"holds the tensors {brief(sorted(found))} instead of {brief(sorted(names))}")
    wanted = str(dtype).removeprefix("torch.")
    for name, (_, kind) in found.items():
        if kind != DTYPES[wanted][1]:
            raise format_error(path, f"`{name}` has dtype {kind}, the manifest says {wanted}")
    return {name: shape for name, (shape, _) in found.items()}
