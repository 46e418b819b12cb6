"""The weights as a bank's origin keeps them, and where those of two models differ."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Rounding to a dtype moves a normal number by at most this share of itself.
HALF_STEPS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST_HALF = 2.0**-25  # by which float16 moves a number too small for its full precision
SAME_FREQUENCY = 2.0**-16  # share of a frequency: above what devices differ by, below what a cast does to it
OTHER_FREQUENCIES = "the rotary frequencies have other values than in the model that made the bank"
# Weights that ask a bank and do not make it: documents are encoded without them.
ASKING_MODULES = frozenset({"router_q_proj", "router_score_bias"})
SLACK = 1.01  # the bounds above are reached, and compared in float64


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that was active.

    Attributes:
        name: as the user named it; for messages.
        fingerprint: of its weights and settings in all layers.
        scalings: the distinct factors of what it adds, ascending; for messages.
    """

    name: str
    fingerprint: str
    scalings: tuple[float, ...] = ()


@dataclass(frozen=True)
class WeightsRecord:
    """The weights of a model, as far as a bank depends on them.

    Attributes:
        fingerprint: of the parameters without adapters; values count rounded to bfloat16.
        parameters: digest of their names and shapes.
        dtypes: of each parameter, or one of all.
        values: some float32 values of each parameter that is not quantized, little-endian: where dtypes differ, these
            tell whether one model may be the other one rounded.
        quantized: kinds of quantized parameters.
        buffers: digest of what is saved besides the parameters, None where nothing is.
        frequencies: some float32 values of the frequencies of rotary positions, which follow from the configuration,
            and which a cast of the model rounds; None where it has none.
        adapters: active ones, in the order of their fingerprints.
        adapted: `values` with what the adapters add; None where there are none, or where it is not that simple.
        adapter_dtype: of the least precise adapter in `adapted`.
        states: as `fingerprint`, without the weights that only ask (`ASKING_MODULES`), so that a bank stays good while
            these are trained; None in banks that were made without it.
        names: name and number of `values` of each parameter; only of a model at hand.
        older: the fingerprint that earlier versions took, of all adapters that are loaded; None where none is.
    """

    fingerprint: str
    parameters: str
    dtypes: tuple[str, ...]
    values: bytes
    quantized: tuple[str, ...] = ()
    buffers: str | None = None
    frequencies: bytes | None = None
    adapters: tuple[AdapterRecord, ...] = ()
    adapted: bytes | None = None
    adapter_dtype: str = "float32"
    states: str | None = None
    names: tuple[tuple[str, int], ...] = field(default=(), compare=False, repr=False)
    older: str | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, object]:
        """JSON values; what only a model at hand knows is left out."""
        record: dict[str, object] = {
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "values": base64.b64encode(self.values).decode(),
            "quantized": list(self.quantized),
            "buffers": self.buffers,
            "adapters": [
                {"name": item.name, "fingerprint": item.fingerprint, "scalings": list(item.scalings)}
                for item in self.adapters
            ],
        }
        if self.frequencies is not None:
            record["frequencies"] = base64.b64encode(self.frequencies).decode()
        if self.adapted is not None:
            record["adapted"] = base64.b64encode(self.adapted).decode()
            record["adapter_dtype"] = self.adapter_dtype
        if self.states is not None:
            record["states"] = self.states
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> WeightsRecord:
        """The inverse of `to_dict`; fields that it does not know are ignored.

        Raises:
            ValueError: for a missing or mistyped field, naming it.
        """

        def text(source: Mapping[str, Any], name: str) -> str:
            if not isinstance(source.get(name), str):
                raise ValueError(f"`weights.{name}` must be a string")
            return source[name]

        def items(source: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
            found = source.get(name)
            if not isinstance(found, list) or any(type(item) is not kind for item in found):
                raise ValueError(f"`weights.{name}` must be a list of {kind.__name__}")
            return tuple(found)

        def numbers(name: str) -> bytes:
            try:
                content = base64.b64decode(text(record, name), validate=True)
            except binascii.Error as error:
                raise ValueError(f"`weights.{name}` is not base64") from error
            if len(content) % 4:
                raise ValueError(f"`weights.{name}` must hold whole float32 numbers")
            return content

        if not isinstance(record, Mapping):
            raise ValueError("`weights` must be an object")
        adapters = tuple(
            AdapterRecord(text(item, "name"), text(item, "fingerprint"), items(item, "scalings", float))
            for item in items(record, "adapters", dict)
        )
        adapted, frequencies = (
            numbers(name) if record.get(name) is not None else None for name in ("adapted", "frequencies")
        )
        return cls(
            fingerprint=text(record, "fingerprint"),
            parameters=text(record, "parameters"),
            dtypes=items(record, "dtypes", str),
            values=numbers("values"),
            quantized=items(record, "quantized", str),
            buffers=None if record.get("buffers") is None else text(record, "buffers"),
            frequencies=frequencies,
            adapters=adapters,
            adapted=adapted,
            adapter_dtype="float32" if adapted is None else text(record, "adapter_dtype"),
            states=None if record.get("states") is None else text(record, "states"),
        )

    def describe_dtypes(self) -> str:
        """The distinct dtypes, ascending, separated by commas."""
        return ", ".join(sorted(set(self.dtypes))) or "no dtype"

    def dtype_of_values(self, names: Sequence[tuple[str, int]]) -> np.ndarray:
        """The dtype that each of `values` was stored in, [n] str."""
        dtypes = self.dtypes * len(names) if len(self.dtypes) == 1 else self.dtypes
        return np.repeat(np.array(dtypes, dtype=object), [count for _, count in names])


def weight_differences(bank: WeightsRecord, model: WeightsRecord) -> list[str]:
    """List where the weights that made a bank and those of a model at hand differ: a line per kind, empty if nowhere.

    Weights are the same if their fingerprints are, or if dtypes differ so that these cannot be, and every value kept
    may be the other one rounded. On equal weights the active adapters must be equal; on others, what weights and
    adapters come to.
    """
    lines = []
    plain = bank.parameters == model.parameters and not bank.quantized and not model.quantized
    same = bank.fingerprint == model.fingerprint or (bank.states is not None and bank.states == model.states)
    same = same or (plain and _rounds_otherwise(bank, model) and not _unequal(bank, model).any())
    adapters = {item.fingerprint for item in bank.adapters} != {item.fingerprint for item in model.adapters}
    if not same and plain and (bank.adapters or model.adapters) and not _unequal_adapted(bank, model).any():
        return []  # merged in one, at work in the other
    if adapters:
        lines.append(_adapter_line(bank, model))
    if not same:
        lines.append(f"model_fingerprint: the bank has {bank.fingerprint}, the model {model.fingerprint}: ")
        lines[-1] += _weights_in_words(bank, model)
    if bank.buffers != model.buffers:
        lines.append(
            "buffers: what the model saves besides its parameters (scales of quantized weights, correction biases) "
            "has other values than in the model that made the bank"
        )
    return lines


def frequency_differences(bank: WeightsRecord, model: WeightsRecord) -> list[str]:
    """A line where the frequencies of positions differ by more than a cast does to them."""
    return ["positions: " + OTHER_FREQUENCIES] if _frequencies_within(bank, model, rounded=True) is False else []


def frequencies_were_rounded(bank: WeightsRecord, model: WeightsRecord) -> bool:
    """Tell whether the frequencies of positions differ by what a cast does to them."""
    return _frequencies_within(bank, model, rounded=False) is False and not frequency_differences(bank, model)


def _frequencies_within(bank: WeightsRecord, model: WeightsRecord, rounded: bool) -> bool | None:
    """Tell whether frequencies are equal, up to how devices compute or, if `rounded`, how those of one were rounded.

    None where one of the two does not know them.
    """
    if bank.frequencies is None or model.frequencies is None:
        return None
    ours, theirs = (np.frombuffer(record.frequencies or b"", "<f4") for record in (bank, model))
    if len(ours) != len(theirs):
        return False
    scale = np.maximum(np.abs(ours), np.abs(theirs)).astype(np.float64)
    allowed = SAME_FREQUENCY * scale
    for side in (ours, theirs) if rounded else ():
        bits = side.view("<u4")
        if not (bits & 0xFFFF).any():
            allowed += SLACK * HALF_STEPS["bfloat16"] * scale
        elif np.array_equal(side.astype(np.float16).astype(np.float32), side):
            allowed += SLACK * (HALF_STEPS["float16"] * scale + SMALLEST_HALF)
    return bool((np.abs(ours.astype(np.float64) - theirs) <= allowed).all())


def _rounds_otherwise(bank: WeightsRecord, model: WeightsRecord) -> bool:
    """Tell whether equal weights may have unequal fingerprints, which see values rounded to bfloat16: by float16."""
    count = len(model.names)
    dtypes = [record.dtypes * count if len(record.dtypes) == 1 else record.dtypes for record in (bank, model)]
    pairs = zip(*dtypes, strict=False)
    return any(was != now and not {was, now} <= {"float32", "bfloat16"} for was, now in pairs)


def _values(content: bytes, names: Sequence[tuple[str, int]]) -> np.ndarray | None:
    values = np.frombuffer(content, "<f4").astype(np.float64)
    return values if len(values) == sum(count for _, count in names) else None


def _bounds(record: WeightsRecord, names: Sequence[tuple[str, int]], scale: np.ndarray) -> np.ndarray:
    """Bound how far values of about `scale` may lie from those that were rounded to the dtypes of `record`."""
    dtypes = record.dtype_of_values(names)
    steps = np.array([HALF_STEPS.get(kind, 0.0) for kind in dtypes])
    return SLACK * (steps * scale + np.where(dtypes == "float16", SMALLEST_HALF, 0.0))


def _unequal(bank: WeightsRecord, model: WeightsRecord) -> np.ndarray:
    """[n] bool, the values that cannot be the same number, rounded to the dtypes of the two."""
    ours, theirs = (_values(record.values, model.names) for record in (bank, model))
    if ours is None or theirs is None or not {len(bank.dtypes), len(model.dtypes)} <= {1, len(model.names)}:
        return np.ones(1, bool)
    scale = np.maximum(np.abs(ours), np.abs(theirs))
    allowed = sum(_bounds(record, model.names, scale) for record in (bank, model))
    known = bank.dtype_of_values(model.names) == model.dtype_of_values(model.names)
    return (np.abs(ours - theirs) > np.where(known, 0.0, allowed)) & ~_only_ask(model.names)


def only_asks(name: str) -> bool:
    """Tell whether a parameter takes no part in encoding documents."""
    return not ASKING_MODULES.isdisjoint(name.split("."))


def _only_ask(names: Sequence[tuple[str, int]]) -> np.ndarray:
    """[n] bool, the values of parameters that take no part in encoding documents."""
    return np.repeat([only_asks(name) for name, _ in names], [count for _, count in names])


def _unequal_adapted(bank: WeightsRecord, model: WeightsRecord) -> np.ndarray:
    """[n] bool, the values that differ with what adapters add, beyond what adding and rounding it does."""
    sides = []
    for record in (bank, model):
        plain = _values(record.values, model.names)
        whole = _values(record.adapted or (b"" if record.adapters else record.values), model.names)
        if plain is None or whole is None or len(record.dtypes) not in (1, len(model.names)):
            return np.ones(1, bool)
        sides.append((plain, whole))
    scale = np.max([np.abs(part) for side in sides for part in side], axis=0)
    allowed = np.zeros_like(scale)
    for record, (plain, whole) in zip((bank, model), sides, strict=True):
        step = HALF_STEPS.get(record.adapter_dtype, 0.0)
        allowed += 2 * _bounds(record, model.names, scale) + 16 * step * np.abs(whole - plain)
    return (np.abs(sides[0][1] - sides[1][1]) > allowed) & ~_only_ask(model.names)


def _adapter_line(bank: WeightsRecord, model: WeightsRecord) -> str:
    def listed(record: WeightsRecord) -> str:
        names = [repr(item.name) for item in record.adapters]
        return f"adapter{'s' * (len(names) > 1)} {' and '.join(names)}" if names else "no adapter"

    ours, theirs = ({item.name: item for item in record.adapters} for record in (bank, model))
    active = f"{listed(model)} {'are' if len(theirs) > 1 else 'is'} active"
    if ours.keys() != theirs.keys():
        return f"adapters: {active}, the bank was made with {listed(bank).replace('adapter ', '', bool(theirs))}"
    changes = []
    for name, item in theirs.items():
        was = ours[name]
        if item.scalings != was.scalings:
            scales = [" and ".join(f"{scale:g}" for scale in record.scalings) for record in (item, was)]
            changes.append(f"{name!r} is scaled by {scales[0]}, when the bank was made by {scales[1]}")
        elif item.fingerprint != was.fingerprint:
            changes.append(f"{name!r} has other weights than when the bank was made")
    return f"adapters: {active}, but {'; '.join(changes)}"


def _weights_in_words(bank: WeightsRecord, model: WeightsRecord) -> str:
    if bank.quantized != model.quantized:
        kinds = [
            f"quantized ({', '.join(record.quantized)})" if record.quantized else "not quantized"
            for record in (bank, model)
        ]
        return f"the weights that made the bank were {kinds[0]}, the model's are {kinds[1]}"
    if bank.parameters != model.parameters:
        return "the parameters have other names or shapes"
    unequal = _unequal(bank, model)
    dtypes = [record.describe_dtypes() for record in (bank, model)]
    note = "" if dtypes[0] == dtypes[1] else f" (the bank was made in {dtypes[0]}, the model is in {dtypes[1]})"
    if len(unequal) != sum(count for _, count in model.names) or not unequal.any():
        return f"some weights have other values{note}"
    owners = np.repeat(np.arange(len(model.names)), [count for _, count in model.names])
    changed = np.unique(owners[unequal])
    first = model.names[int(changed[0])][0]
    return f"{len(changed)} of {len(model.names)} parameters have other values, the first is {first}{note}"
