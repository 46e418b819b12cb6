"""Batches of documents through the model, and what it makes of them on its way to where the bank lies.

Beside a GPU the host launches further batches before it looks at one, so that neither waits for the other; and what is
to lie in host memory leaves the GPU while the next batch is computed. Elsewhere every batch is there at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention_msa import NotFiniteError
from .compiled_layers_msa import CompiledLayers
from .dense_layer_msa import DenseLayer, chunks_of
from .fp8_projections_msa import Fp8Projections
from .streams_msa import Departures, send
from .wrapping_msa import input_device

AHEAD = 8  # batches that are launched before one is looked at, beside a GPU; their results are small
Counted = Callable[[list[int]], object]  # told the places, in the window, of documents that were given to the model


@dataclass
class _Batch:
    """A batch that was launched.

    Attributes:
        places: of its documents in the window.
        layers: their memory, perhaps still on its way.
        finite: [layers] bool, likewise: whether all numbers of a layer are.
        arrived: happens once all of this is there.
    """

    places: list[int]
    layers: dict[int, DenseLayer]
    finite: Tensor
    arrived: torch.cuda.Event | None


class EncodingLayers:
    """A model's decoder layers as documents are encoded with them, made once for all windows of a corpus.

    The model has them while documents are given to it, and its own in between: what is asked of it then, be it by who
    makes the documents, is answered by those.

    Args:
        model: its weights are those of now.
        compiled: whether they are compiled.
        fp8: whether they project in 8-bit floats.

    Raises:
        ValueError: for models and devices that cannot have them.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False, fp8: bool = False) -> None:
        self._kinds: list[Fp8Projections | CompiledLayers] = []
        if fp8:
            self._kinds.append(Fp8Projections(model))
        if compiled:  # behind the others, of which their graphs are made
            self._kinds.append(CompiledLayers(model))
        # Under compiled layers, passes keep what they record out of the graphs.
        self.options = {"separately": True} if compiled else {}

    @contextmanager
    def lent(self) -> Iterator[None]:
        """A block in which the model has them."""
        with ExitStack() as stack:
            for kind in self._kinds:
                stack.enter_context(kind.lent())
            yield


def batches_ahead(device: torch.device) -> int:
    """The number of batches launched on a device before one is looked at."""
    return AHEAD if device.type == "cuda" else 0


class EncodedWindow:
    """Documents that were given to the model, in batches of similar length, and their memory once it is asked for.

    Args:
        model: has `encode_batch`.
        keys: of the documents.
        ids: token ids [tokens] int64 of each.
        batch_tokens: tokens per batch, padding included.
        device: where the memory is to lie.
        counted: see `Counted`.
        layers: with which they are encoded.

    Raises:
        ValueError: for numbers that are not finite, naming the document; here, or from `wait` and `layers`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Sequence[str],
        ids: Sequence[Tensor],
        batch_tokens: int,
        device: torch.device,
        counted: Counted,
        layers: EncodingLayers,
    ) -> None:
        self._keys, self._chunk_size, self._device = keys, model.config.chunk_size, device
        self._lengths = torch.tensor([len(item) for item in ids])
        self._batches: list[_Batch] = []
        self._unseen: deque[_Batch] = deque()
        source = input_device(model)
        self._departures, ahead = Departures(source), batches_ahead(source)
        with layers.lent():
            for places in self._places(batch_tokens):
                padded = torch.nn.utils.rnn.pad_sequence([ids[place] for place in places], batch_first=True)
                encoded = model.encode_batch(send(padded, source), self._lengths[places], **layers.options)
                self._send(places, encoded, source)
                counted(places)
                while len(self._unseen) > ahead:
                    self._look()

    def _places(self, batch_tokens: int) -> Iterator[list[int]]:
        """The places of the documents of every batch."""
        lengths = self._lengths.tolist()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= batch_tokens:
                stop += 1
            yield order[start:stop]
            start = stop

    def _send(self, places: list[int], encoded: dict[int, DenseLayer], source: torch.device) -> None:
        """Let what was made of a batch go to where it is to lie."""
        send_away, host = self._departures.send, torch.device("cpu")
        finite = [item.routing_keys.isfinite().all() & item.pooled_kv.isfinite().all() for item in encoded.values()]
        layers = {
            layer: DenseLayer(send_away(item.routing_keys, self._device), send_away(item.pooled_kv, self._device))
            for layer, item in encoded.items()
        }
        flags = send_away(torch.stack([flag.to(source) for flag in finite]), host)
        batch = _Batch(places, layers, flags, self._departures.mark())
        self._batches.append(batch)
        self._unseen.append(batch)

    def _look(self) -> None:
        """Wait for the first batch that was not looked at, and refuse what no memory can hold."""
        batch = self._unseen.popleft()
        if batch.arrived is not None:
            batch.arrived.synchronize()
        for (layer, memory), finite in zip(batch.layers.items(), batch.finite.tolist(), strict=True):
            if not finite:
                rows = memory.pooled_kv.flatten(1).isfinite().all(1) & memory.routing_keys.isfinite().all(1)
                chunks = chunks_of(self._lengths[batch.places], self._chunk_size)
                place = int(torch.searchsorted(chunks, int((~rows).nonzero()[0]), right=True)) - 1
                raise NotFiniteError(
                    f"Document {self._keys[batch.places[place]]!r} has NaN or infinite states in layer {layer}: the "
                    "model's weights hold NaN, or its dtype overflows. Nothing was written."
                )

    def wait(self) -> None:
        """Wait until all of it is there."""
        while self._unseen:
            self._look()

    def layers(self) -> dict[int, DenseLayer]:
        """The memory of the documents, in their order; the window lets go of it."""
        self.wait()
        batches, self._batches = self._batches, []
        order = [place for batch in batches for place in batch.places]
        offsets = chunks_of(self._lengths[order], self._chunk_size)
        slot = torch.tensor(order).argsort()  # where each document of the window lies among the encoded ones
        counts = offsets.diff()[slot]
        starts = offsets[:-1][slot].repeat_interleave(counts)
        within = torch.arange(int(offsets[-1])) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        # Where each chunk goes: every number is copied once, from its batch to its place.
        places = send((starts + within).argsort(), self._device)

        def joined(parts: list[Tensor]) -> Tensor:
            whole = parts[0].new_empty(len(places), *parts[0].shape[1:])
            for part, to in zip(parts, places.split([len(part) for part in parts]), strict=True):
                whole.index_copy_(0, to, part)
            return whole

        return {
            layer: DenseLayer(
                joined([batch.layers[layer].routing_keys for batch in batches]),
                joined([batch.layers[layer].pooled_kv for batch in batches]),
            )
            for layer in batches[0].layers
        }
