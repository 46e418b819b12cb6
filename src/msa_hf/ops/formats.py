"""The formats that routing keys and content may be kept in: the one table that everything else reads.

A vector (a routing key, or the key or value of a chunk) is kept as numbers of a format, where that is a narrow one with
one float32 scale: `vector = scale * numbers`. A new format is an entry of `FORMATS`, and kernels where it is of a new
dtype. Plans, placements, commands and `quantize_keys` take it up by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BYTES = 4  # float32


@dataclass(frozen=True)
class Packing:
    """Several whole numbers in one element of a tensor.

    Attributes:
        numbers: how many.
        pack: [C, E] int8 -> [C, ceil(E / numbers)].
        unpack: the inverse, which is also given E.
    """

    numbers: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Format:
    """A way to keep numbers.

    Attributes:
        name: what users write.
        dtype: of the tensor that holds them.
        operations: those that take it as it lies: `route_documents` routing keys, `gather_documents` content; and
            `pool_chunks` where it makes such keys.
        largest: the largest number; a vector's scale is its largest absolute value over this. None for numbers that
            are kept as they are, without a scale.
        packing: of several numbers in an element; None for one.
        candidates: of every document wanted, how many are scored again by exact keys where these keys found them,
            unless a caller says otherwise.
        note: for users, where `route_documents` does not take it: why.
    """

    name: str
    dtype: torch.dtype
    operations: frozenset[str]
    largest: float | None = None
    packing: Packing | None = None
    candidates: int = 4
    note: str = ""

    @property
    def scaled(self) -> bool:
        """Tell whether each vector has a scale."""
        return self.largest is not None

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 * self.dtype.itemsize // (1 if self.packing is None else self.packing.numbers)

    def vector_bytes(self, width: int) -> int:
        """Bytes of a vector of `width` numbers, with its scale."""
        return -(-width * self.bits // 8) + SCALE_BYTES * self.scaled

    def quantize(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and scales of the rows of a floating [C, E], rounded to the nearest; see `quantize_keys`."""
        assert self.largest is not None, f"{self.name} has no scales"
        keys = keys.float()
        most = keys.abs().amax(1) if keys.shape[1] else keys.new_zeros(keys.shape[0])
        scales = torch.where(most > 0, most / self.largest, 1.0)
        # Subnormal scales would overflow the division.
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        numbers = (keys / scales[:, None]).clamp(-self.largest, self.largest)
        if self.dtype.is_floating_point:
            return numbers.to(self.dtype), scales
        whole = numbers.round().to(torch.int8)
        return (whole if self.packing is None else self.packing.pack(whole)), scales

    def unpacked(self, stored: Tensor, width: int) -> Tensor:
        """[C, ...] as it is kept -> [C, width] numbers, an element each."""
        return stored if self.packing is None else self.packing.unpack(stored, width)


def pack_int4(numbers: Tensor) -> Tensor:
    """[C, E] int8 from -8 to 7 -> [C, ceil(E / 2)] uint8; the even columns are the low halves."""
    numbers = torch.nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).view(torch.uint8) & 15
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_int4`: [C, width] int8."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :width].view(torch.int8)
    return ((halves ^ 8) - 8).contiguous()


KEYS, CONTENT, MADE = "route_documents", "gather_documents", "pool_chunks"
ALL = frozenset({KEYS, CONTENT, MADE})

# Of as many bits the preferred one first.
FORMATS = {
    format.name: format
    for format in (
        Format("fp32", torch.float32, ALL),
        Format("bf16", torch.bfloat16, ALL),
        Format("fp16", torch.float16, ALL),
        Format("fp8", torch.float8_e4m3fn, ALL, largest=448.0),
        Format("int8", torch.int8, frozenset({KEYS, MADE}), largest=127.0),
        Format(
            "int4",
            torch.uint8,
            frozenset(),
            largest=7.0,
            packing=Packing(2, pack_int4, unpack_int4),
            note=" (packed: route_documents cannot score them as they lie yet)",
        ),
    )
}


def all_formats() -> list[Format]:
    """Every format, the widest first."""
    return sorted(FORMATS.values(), key=lambda format: -format.bits)


def names_of(formats: Sequence[Format]) -> tuple[str, ...]:
    return tuple(format.name for format in formats)


def key_formats() -> tuple[str, ...]:
    """Names of the formats that routing keys may be planned in."""
    return names_of(all_formats())


def routed_formats() -> tuple[str, ...]:
    """Names of those that routing keys are scored in as they lie."""
    return names_of([format for format in all_formats() if KEYS in format.operations])


def content_formats() -> tuple[str, ...]:
    """Names of those that content may have."""
    return names_of([format for format in all_formats() if CONTENT in format.operations])


def why_not_routed(name: str) -> str:
    """A remark in brackets where no routing keys of this format are scored as they lie; empty where they are."""
    format = FORMATS[name]
    return "" if KEYS in format.operations else format.note or " (route_documents does not score them)"


def scaled_formats() -> tuple[str, ...]:
    """Names of those with a scale per vector."""
    return names_of([format for format in all_formats() if format.scaled])


def format_of(dtype: torch.dtype, operation: str | None = None) -> Format | None:
    """The first format of a dtype, one number an element; with `operation`, of those that it takes."""
    for format in FORMATS.values():
        if format.dtype == dtype and format.packing is None and (operation is None or operation in format.operations):
            return format
    return None


def is_scaled(dtype: torch.dtype, operation: str) -> bool:
    """Tell whether an operation takes numbers of this dtype, and with scales."""
    found = format_of(dtype, operation)
    return found is not None and found.scaled


def scaled_dtypes(operation: str) -> tuple[torch.dtype, ...]:
    """The dtypes that an operation takes with scales."""
    dtypes = [format.dtype for format in FORMATS.values() if format.scaled and operation in format.operations]
    return tuple(dict.fromkeys(dtypes))


def scaled_names(operation: str) -> str:
    """The same in words: "int8 and float8_e4m3fn"."""
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in scaled_dtypes(operation))


def usual_candidates(dtype: torch.dtype) -> int:
    """`Format.candidates` of keys of a dtype."""
    found = format_of(dtype)
    return 1 if found is None else found.candidates


def own_format(dtype: torch.dtype) -> Format:
    """The format of a bank's own tensors, which have no scales.

    Raises:
        ValueError: for a dtype that no bank is kept in.
    """
    found = format_of(dtype)
    if found is None or found.scaled:
        known = ", ".join(str(format.dtype) for format in FORMATS.values() if not format.scaled)
        raise ValueError(f"A bank is kept in one of {known}, not in {dtype}.")
    return found


# Of numbers in one byte, whatever they mean: not every version of torch moves all of them -----------------------------


def index_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor.index_select(0, rows)`."""
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(0, rows)
    return tensor.view(torch.uint8).index_select(0, rows).view(tensor.dtype)


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(tuple(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)
