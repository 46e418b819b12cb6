"""Runs recorded as CUDA graphs and played again: one launch for what lies between two calls of the host.

What a run reads lies in tensors of its own, into which the arguments of later runs are copied; what it gives is
overwritten when it is played again. Parts that the host must do anew, as asking a memory, cut the recording in two.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .adapters_msa import adapter_state
from .walking_msa import met_in

logger = logging.get_logger(__name__)

Step = Callable[[], object]
HostFunction = Callable[[], Sequence[Tensor]]
Addresses = Callable[[], Hashable | None]
Inputs = Mapping[str, Tensor]
Result = TypeVar("Result")

# Runs of a kind that may fail to be recorded: one that has to compile something after all does, and the next finds it.
MOST_FAILURES = 2


class Tape(Protocol):
    """Something that records what a device is given to do; one part after the other."""

    def running(self) -> AbstractContextManager[None]:
        """Everything between the first part and the last stands in it, and a run before that is to be like it."""

    def begin(self) -> None:
        """Begin a part. The device does not do it now."""

    def end(self) -> Step:
        """End a part; a call of the result has the device do it."""


class CudaTape:
    """CUDA graphs that share one pool of memory.

    What one run leaves in between is room for the next that is recorded. Runs of one tape are therefore played one
    after the other, never one within another.

    Args:
        device: with an index or the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Of the few with priority: those without are handed out again, and whoever gets this one would take memory that
        # a run has left there while the caller's stream still reads it.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.collecting = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On a stream of its own, as recording demands."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def begin(self) -> None:
        self.collecting = gc.isenabled()
        gc.disable()  # to free a graph disturbs the one that is recorded
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()  # PyTorch takes no more graphs into one whose last is gone
        self.graph = torch.cuda.CUDAGraph()
        _free_workspaces()
        # Other threads may go on working with the device.
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> Step:
        graph, self.graph = self.graph, None
        assert graph is not None
        try:
            graph.capture_end()
        except RuntimeError:
            self._leave_failed()
            raise
        finally:
            _free_workspaces()
            if self.collecting:
                gc.enable()
        self.graphs.add(graph)
        return graph.replay

    def _leave_failed(self) -> None:
        """Leave a part that the device refused to record: PyTorch's random numbers believe to be recorded until a part
        is ended, and its allocator goes on filling the pool."""
        self.pool = torch.cuda.graph_pool_handle()
        empty = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is empty
            empty.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            empty.capture_end()


def _free_workspaces() -> None:
    # Around a recording, as torch.compile does around its own: matrix products of a graph go on using the workspace
    # that they were recorded with, which must be of the graph's pool. Others are freed by whoever records next.
    torch._C._cuda_clearCublasWorkspaces()


def tape_for(device: torch.device) -> Tape | None:
    """A tape for a device, None where it has no graphs."""
    return CudaTape(device) if device.type == "cuda" else None


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


class Recording:
    """The steps of one run, in order: parts on the tape, and calls of the host between them.

    A part is done as soon as it is recorded, so that what follows sees numbers. The run that is recorded is a run.

    Args:
        tape: of the parts.
        between: of what is recorded later of the calls, which are played while parts wait for each other's numbers.

    Attributes:
        on_host: the host is being called; what it raises is no failure to record.
    """

    def __init__(self, tape: Tape, between: Tape) -> None:
        self.tape, self.between = tape, between
        self.steps: list[Step] = []
        self.on_host = False

    def record(self, run: Callable[[], Result]) -> Result:
        """Run once. What the result holds is overwritten by `play`."""
        with self.tape.running():
            token = _recording.set(self)
            try:
                self.tape.begin()
                result = run()
                self._end_part()
            except BaseException:
                with contextlib.suppress(Exception):
                    self.tape.end()
                raise
            finally:
                _recording.reset(token)
        return result

    def play(self) -> None:
        """Run again, on what lies in the inputs now."""
        for step in self.steps:
            step()

    def _end_part(self) -> None:
        step = self.tape.end()
        self.steps.append(step)
        step()

    def call(self, function: HostFunction, addresses: Addresses) -> tuple[Tensor, ...]:
        """The results of `function`, which is called anew by every `play`: the same shapes, in the same places."""
        self._end_part()
        self.on_host = True
        step = HostCall(self.between, function, addresses)
        self.on_host = False
        self.steps.append(step)
        self.tape.begin()
        return step.places


class HostCall:
    """A step that the host does anew. While what it reads stays where it is, it is a recording of its own.

    Args:
        tape: records it.
        function: what is done; the first call is made here.
        addresses: see `call_between`.

    Attributes:
        places: of its results.
    """

    def __init__(self, tape: Tape, function: HostFunction, addresses: Addresses) -> None:
        self.tape, self.function, self.addresses = tape, function, addresses
        self.places = tuple(item.clone() for item in function())
        self.last = addresses()
        self.step: Step | None = None

    def __call__(self) -> None:
        addresses = self.addresses()
        if addresses is None or addresses != self.last:
            self.last, self.step = addresses, None
            self._run()
            return
        if self.step is None:
            self.step = self._recorded()
        self.step()

    def _run(self) -> None:
        copy_all(self.places, self.function())

    def _recorded(self) -> Step:
        with self.tape.running():
            try:
                self.tape.begin()
                self._run()
            except BaseException as error:
                with contextlib.suppress(Exception):
                    self.tape.end()
                if not isinstance(error, RuntimeError):
                    raise
                logger.warning_once(f"A memory is asked launch by launch, it cannot be recorded: {error}")
                return self._run
            return self.tape.end()


def call_between(function: HostFunction, addresses: Addresses) -> tuple[Tensor, ...]:
    """Call a function of the host; where a run is being recorded, between two of its parts.

    Args:
        addresses: where all lies that the function reads, if it only launches work; None where it does more.
    """
    recording = _recording.get()
    return tuple(function()) if recording is None else recording.call(function, addresses)


# Runs of a cache ------------------------------------------------------------------------------------------------------


class Places:
    """Tensors into which the inputs of runs of one kind are copied.

    Args:
        inputs: of the first.
        device: where they lie.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.tensors = {name: item.to(device, copy=True) for name, item in inputs.items()}
        self.given = {name: (item, version_of(item)) for name, item in inputs.items()}

    def fill(self, inputs: Inputs) -> None:
        """Copy inputs to their places, but those that lie there already."""
        for name, tensor in inputs.items():
            last, version = self.given[name]
            if last is not tensor or version != version_of(tensor) or version < 0:
                self.tensors[name].copy_(tensor)
                self.given[name] = tensor, version_of(tensor)


@dataclass
class Recorded(Generic[Result]):
    """A run that can be played.

    Attributes:
        recording: its steps.
        held: the tensors that it reads besides inputs and weights. Not what was recorded: that holds the model.
        result: what is overwritten.
    """

    recording: Recording
    held: object
    result: Result


class Recordings:
    """The recorded runs over the tensors of one cache.

    The first run of a kind is plain: it compiles, and a run that never comes again is not worth recording. The second
    is recorded; it reads the same tensors, on the same stream, so that nothing is compiled then. A copy of it is empty:
    graphs cannot be copied.

    Attributes:
        places: kind -> where its inputs are.
        known: kind -> its recording.
        failures: kind -> how many of its runs could not be recorded.
    """

    def __init__(self) -> None:
        self.tapes: tuple[Tape, Tape] | None = None
        self.state: object = None
        self.places: dict[Hashable, Places] = {}
        self.known: dict[Hashable, Recorded[Any]] = {}
        self.failures: dict[Hashable, int] = {}

    def __deepcopy__(self, memo: object) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def renew(self, state: object) -> None:
        """Forget all where the `state` of the model is not what it was."""
        if state != self.state:
            self.clear()
            self.state = state

    def clear(self) -> None:
        """Forget all, and free its memory."""
        self.state, self.places, self.known, self.failures = None, {}, {}, {}

    def holds(self, result: object) -> bool:
        """Tell whether a result of `run` is that of a recording, which its next run gives again."""
        return any(recorded.result is result for recorded in self.known.values())

    def run(
        self,
        kind: Hashable,
        function: Callable[[Inputs], Result],
        inputs: Inputs,
        device: torch.device,
        undo: Callable[[], Step],
        held: object,
    ) -> Result:
        """The result of `function(inputs)`; the next run may overwrite its tensors.

        Args:
            kind: all that the function depends on besides the numbers in `inputs`.
            inputs: by name; shapes and dtypes are a part of the kind.
            device: that computes it.
            undo: notes what a run changes besides its result, and gives what puts it back; for a run that fails while
                it is recorded, and is repeated.
            held: whatever the function reads that nobody else may keep.
        """
        if self.tapes is None:
            tape, between = tape_for(device), tape_for(device)
            if tape is None or between is None:
                return function(inputs)
            self.tapes = tape, between
        kind = kind, tuple((name, item.shape, item.dtype) for name, item in inputs.items())
        failures = self.failures.get(kind, 0)
        if failures == MOST_FAILURES:
            return function(inputs)
        places = self.places.get(kind)
        if places is None:
            self.places[kind] = places = Places(inputs, device)
            with self.tapes[0].running(), without_cached_casts(device):
                return function(places.tensors)
        places.fill(inputs)
        recorded = self.known.get(kind)
        if recorded is not None:
            recorded.recording.play()
            return recorded.result
        recording, restore = Recording(*self.tapes), undo()
        try:
            with without_cached_casts(device):
                result = recording.record(lambda: function(places.tensors))
        except RuntimeError as error:
            if recording.on_host:
                raise
            self.failures[kind] = failures + 1
            if failures + 1 == MOST_FAILURES:
                logger.warning_once(f"A run of this model is launched piece by piece, it cannot be recorded: {error}")
            restore()
            with without_cached_casts(device):  # what it compiles is for the next that is recorded
                return function(inputs)
        self.known[kind] = Recorded(recording, held, result)
        return result


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on a device now; None where it is off, or the device has none."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


@contextlib.contextmanager
def without_cached_casts(device: torch.device) -> Iterator[None]:
    """Have autocast, where it is on, cast weights anew.

    Casts that it keeps are freed where it ends, and a run that was recorded with them would read them for ever. What is
    compiled is compiled for one or the other: the run before the one that is recorded does without them too.
    """
    if autocast_of(device) is None:
        yield
        return
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def copy_all(places: Sequence[Tensor], items: Sequence[Tensor]) -> None:
    """Copy tensors to `places` of their shapes and dtypes, those of a dtype in one launch."""
    alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, item in zip(places, items, strict=True):
        mine, theirs = alike.setdefault(place.dtype, ([], []))
        mine.append(place)
        theirs.append(item)
    for mine, theirs in alike.values():
        torch._foreach_copy_(mine, theirs)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


def state_of(model: nn.Module) -> tuple[object, ...]:
    """What a recorded run took for granted: where the weights lie, and which adapters are at work."""
    met, plain = met_in(model), (Tensor, nn.Parameter)
    places = [item.data_ptr() if type(item) in plain else id(item) for item in met.tensors()]
    return (model.training, *places, *adapter_state(met))


def is_recordable(model: nn.Module) -> bool:
    """Tell whether all weights lie on one device that has graphs, and in this process alone."""
    devices = {weight.device for weight in model.parameters()}
    spread = any(hasattr(weight, "full_tensor") for weight in model.parameters())
    return not spread and len(devices) == 1 and next(iter(devices)).type == "cuda"
