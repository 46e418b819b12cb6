"""The choice of an implementation for a call, and the reasons against the others.

Four backends share an operation's schema; each is a namespace of torch operations:

| backend | namespace | device | what it is |
|---|---|---|---|
| `cuda` | `msa_hf` | cuda | the compiled extension (csrc/cuda) |
| `triton` | `msa_hf_triton` | cuda | `triton.py` of the operation's folder; on the CPU under Triton's interpreter |
| `cpp` | `msa_hf` | cpu | the compiled extension (csrc/cpu) |
| `pytorch` | `msa_hf_pytorch` | any | `reference.py` of the operation's folder |

The first in this order that is there and takes the call runs it. What a backend does not take, the operation says
(`Operation.limits`). Fakes and autograd are registered here for all of them, so that each works under torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Feature = torch.dtype | int | str | bool | None
# Given the device and the features of a call: None, or a reason that completes the sentence "route_documents cannot run
# on the backend 'cuda': ...". Each takes what features it names, and ignores the others.
Limit = Callable[..., str | None]
Backward = Callable[..., tuple[Tensor | None, ...]]
SetupContext = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Operation(Generic[P, R_co]):
    """An operation as all backends see it.

    Attributes:
        name: of the torch operation.
        schema: its arguments and results; csrc declares the same and says what they are, and a test compares them.
        folder: the package that it lies in, whose `triton.py` holds a function of its name where there is one.
        reference: the implementation in PyTorch, which takes every call.
        check: raises ValueError for arguments that contradict each other, in front of what is written in Python; the
            compiled backends have csrc/checks.h.
        fake: the shapes and dtypes of the results, for tracing.
        limits: backend -> what it does not take; one that is not named takes everything. Features that stand for sizes
            are rounded (`size_class`, `alignment`), because torch.compile may not know the number.
        derivative: namespace -> backward and setup_context, as `torch.library.register_autograd` takes them; None for
            an operation that has none.
    """

    name: str
    schema: str
    folder: str
    reference: Callable[P, R_co]
    check: Callable[P, None]
    fake: Callable[P, R_co]
    limits: dict[str, Limit]
    derivative: Callable[[str], tuple[Backward, SetupContext]] | None = None

    def on(self, namespace: str) -> Callable[P, R_co]:
        """The operation of a backend's namespace."""
        return operator(self.name, namespace)


# Name -> operation; `msa_hf.ops` fills it.
OPERATIONS: dict[str, Operation[..., object]] = {}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def not_floating(*dtypes: torch.dtype) -> str | None:
    """A reason not to take one of these dtypes, or None."""
    wrong = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in FLOATING]
    return f"it takes float32, bfloat16 and float16, not {wrong[0]}" if wrong else None


LEAST_CAPABILITY = (8, 0)  # of GPUs that Triton compiles for


def too_old() -> str | None:
    """A reason not to run Triton's products of matrices on the current GPU, or None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
        return None
    return "it needs a GPU of compute capability 8.0 or newer"


NO_CUDA = "this machine has no CUDA device, or torch was built without CUDA"


class BackendError(RuntimeError):
    """A backend was asked for by name, and is not there or does not take the call."""


@dataclass(frozen=True)
class Backend:
    """One way to run the operations.

    Attributes:
        name: what `backend=` takes.
        namespace: of its torch operations.
        devices: kinds of devices that it is for; empty for any.
        probe: operation -> None where it is there, else why not.
        also: kinds of devices that it runs on only where it is asked for by name.
    """

    name: str
    namespace: str
    devices: tuple[str, ...]
    probe: Callable[[str], str | None]
    also: Callable[[], tuple[str, ...]] = tuple

    def runs_on(self, device: str) -> bool:
        """Tell whether it is for this kind of device."""
        return not self.devices or device in self.devices

    def refuses(self, operation: str, device: str, features: Mapping[str, Feature]) -> str | None:
        """Why this backend does not take a call, or None."""
        if not self.runs_on(device) and device not in self.also():
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        reason = self.probe(operation)
        if reason is None:
            limit = OPERATIONS[operation].limits.get(self.name)
            reason = None if limit is None else limit(device=device, **features)
        return reason


# Extension ------------------------------------------------------------------------------------------------------------


@cache
def load_extension() -> str | None:
    """Load the compiled operations; None where that worked, else why not."""
    reason = load_library(Path(__file__).parent.parent)
    if reason is not None:
        return reason
    for operation in OPERATIONS:
        if _has_kernel(operation, "CPU") or _has_kernel(operation, "CUDA"):
            _register_derived("msa_hf", operation)
    return None


def load_library(directory: Path) -> str | None:
    files = [path for path in sorted(directory.glob("_C.*")) if path.suffix in (".so", ".dylib")]
    if not files:
        return "the extension was not built (no compiler, or no torch, when the package was installed)"
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return f"the extension {files[0].name} does not load: {' '.join(str(error).split())}"
    return None


def extension_info() -> str:
    """The devices that the extension was compiled for, or why there is none."""
    return load_extension() or torch.ops.msa_hf.build_info()


def triton_version() -> str | None:
    return None if importlib.util.find_spec("triton") is None else importlib.metadata.version("triton")


def _has_kernel(operation: str, key: str) -> bool:
    if (operation, key) in _kernels:  # asked by every call, and PyTorch takes 20 us to answer
        return True
    try:
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"msa_hf::{operation}", key)
    except RuntimeError:  # no such operation
        return False
    if found:
        _kernels.add((operation, key))
    return found


_kernels: set[tuple[str, str]] = set()


def _probe_cuda(operation: str) -> str | None:
    if not torch.cuda.is_available():
        return NO_CUDA
    reason = load_extension()
    if reason is None and not _has_kernel(operation, "CUDA"):
        reason = "the extension was built without CUDA kernels for it"
    return reason


def _probe_cpp(operation: str) -> str | None:
    reason = load_extension()
    if reason is None and not _has_kernel(operation, "CPU"):
        reason = "the extension was built without a CPU kernel for it"
    return reason


def _interpreted() -> tuple[str, ...]:
    """The CPU where Triton interprets its kernels: slow, for tests of them."""
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


@cache
def _probe_triton(operation: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return NO_CUDA
    name = f"{OPERATIONS[operation].folder}.triton"
    if importlib.util.find_spec(name) is None:
        return "there is no Triton version of it"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"its Triton version does not import: {error}"
    _register("msa_hf_triton", operation, vars(module)[operation])
    return None


@cache
def _probe_pytorch(operation: str) -> str | None:
    _register("msa_hf_pytorch", operation, OPERATIONS[operation].reference)
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "msa_hf", ("cuda",), _probe_cuda),
        Backend("triton", "msa_hf_triton", ("cuda",), _probe_triton, _interpreted),
        Backend("cpp", "msa_hf", ("cpu",), _probe_cpp),
        Backend("pytorch", "msa_hf_pytorch", (), _probe_pytorch),
    )
}

# Registration ---------------------------------------------------------------------------------------------------------

_libraries: dict[str, torch.library.Library] = {}


def _register(namespace: str, operation: str, function: Callable[..., object]) -> None:
    """Make `function` the torch operation `namespace::operation`."""
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    described = OPERATIONS[operation]

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        described.check(*args, **kwargs)
        return function(*args, **kwargs)

    library.define(operation + described.schema)
    library.impl(operation, checked, "CompositeExplicitAutograd")
    _register_derived(namespace, operation)


def _register_derived(namespace: str, operation: str) -> None:
    """Fake and autograd of `namespace::operation`, which are the same for every backend."""
    described = OPERATIONS[operation]
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    name = f"{namespace}::{operation}"
    torch.library.register_fake(name, described.fake, lib=library)
    if described.derivative is None:
        torch.library.register_autograd(name, _inference_only(name), lib=library)
    else:
        backward, setup_context = described.derivative(namespace)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def _inference_only(name: str) -> Callable[..., NoReturn]:
    def backward(*_: object) -> NoReturn:
        raise RuntimeError(f"{name} is inference only: it has no derivative.")

    return backward


# Choice ---------------------------------------------------------------------------------------------------------------

_wanted: str | None = None
_said: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within, calls that name no backend run on this one, or raise; None: the best again. For the whole process."""
    global _wanted
    before, _wanted = _wanted, None if name is None else _checked(name).name
    try:
        yield
    finally:
        _wanted = before


def _checked(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    return BACKENDS[name]


def _say(level: int, *words: str) -> None:
    if words not in _said:
        _said.add(words)
        logger.log(level, *words)


@torch.compiler.assume_constant_result
def choose(
    operation: str, device: str, backend: str | None = None, prefer: str | None = None, **features: Feature
) -> str:
    """The namespace of the backend that runs a call.

    Args:
        operation: one of `OPERATIONS`.
        device: kind of the device, such as `"cuda"`.
        backend: a name, to get that one or an error.
        prefer: where a call follows another one: that one's namespace, to be taken if it takes this call too. Neither
            `backend` nor `use_backend` says anything about such a call.
        features: what the limits of backends depend on; constants, or torch.compile cannot trace the call.

    Raises:
        BackendError: where the backend asked for is not there, or does not take such a call; naming what is missing.
    """
    wanted = _wanted if backend is None and prefer is None else backend
    if wanted is not None:
        chosen = _checked(wanted)
        reason = chosen.refuses(operation, device, features)
        if reason is not None:
            raise BackendError(f"{operation} cannot run on the backend {wanted!r}: {reason}.")
        _say(logging.INFO, "%s on %s runs on the backend %s, as asked for.", operation, device, wanted)
        return chosen.namespace
    for chosen in sorted(BACKENDS.values(), key=lambda item: item.namespace != prefer):
        preferred = chosen.namespace == prefer
        if not chosen.runs_on(device) and not (preferred and device in chosen.also()):
            continue
        reason = chosen.refuses(operation, device, features)
        if reason is None:
            _say(logging.INFO, "%s on %s runs on the backend %s.", operation, device, chosen.name)
            return chosen.namespace
        # One that is there and refuses this call is a surprise; one that is not there is seen with `msa-hf doctor`.
        level = logging.INFO if chosen.probe(operation) is not None else logging.WARNING
        _say(level, "%s on %s does not run on the backend %s: %s.", operation, device, chosen.name, reason)
    raise AssertionError("the reference takes every call")


def operator(operation: str, namespace: str) -> torch._ops.OpOverloadPacket:
    """The torch operation."""
    return getattr(getattr(torch.ops, namespace), operation)


def size_class(size: int) -> int:
    """The least power of two that is not below `size`: a constant for torch.compile where sizes are not."""
    bound = 1
    while bound < size:
        bound *= 2
    return bound


def alignment(size: int) -> int:
    """The largest power of two up to 64 that divides `size`; a constant for torch.compile."""
    return next(power for power in (64, 32, 16, 8, 4, 2, 1) if size % power == 0)
