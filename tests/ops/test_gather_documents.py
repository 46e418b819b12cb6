"""`gather_documents` on every backend: rows are copies, so they must be equal to the bit."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from battery import FLOATING, offsets_of, places, poisoned_memory, split_up, surrounded, takes
from torch import Tensor

from msa_hf.ops import dispatch, gather_documents

PLACES = places("gather_documents")
SHAPES = ((1, 8), (2, 8), (8, 16), (1, 64), (8, 128), (3, 40), (32, 64), (2, 6), (1, 3))


@dataclass
class Case:
    """One call on the CPU."""

    documents: Tensor
    counts: list[int]
    content: Tensor
    scales: Tensor | None = None
    dtype: torch.dtype | None = None

    def chosen(self, sample: int) -> list[tuple[int, int]]:
        """(document, column) in ascending order of documents."""
        row = self.documents[sample].tolist()
        return sorted((document, column) for column, document in enumerate(row) if document >= 0)

    @property
    def most(self) -> int:
        return max((self.rows(sample) for sample in range(len(self.documents))), default=0)

    def rows(self, sample: int) -> int:
        return sum(self.counts[document] for document, _ in self.chosen(sample))

    def run(self, place: tuple[str, str], width: int, content: Tensor | None = None) -> tuple[Tensor, ...]:
        backend, device = place
        with poisoned_memory():
            found = gather_documents(
                surrounded(self.documents, device),
                offsets_of(self.counts).to(device),
                surrounded(self.content, device) if content is None else content,
                width,
                scales=None if self.scales is None else surrounded(self.scales, device),
                dtype=self.dtype,
                backend=backend,
            )
        return tuple(item.cpu() for item in found)

    def check(self, found: tuple[Tensor, ...], width: int) -> None:
        keys, values, valid, slots = found
        groups, dim = self.content.shape[2:]
        content = self.content if self.scales is None else self.content.float() * self.scales[..., None, None]
        content = content.to(self.dtype or content.dtype)
        offsets = offsets_of(self.counts).tolist()
        batch = len(self.documents)
        assert keys.shape == values.shape == (batch, groups, width, dim) and keys.dtype == values.dtype == content.dtype
        assert valid.shape == slots.shape == (batch, width)
        assert valid.dtype == torch.bool and slots.dtype == torch.int64
        for sample in range(batch):
            wanted = [
                (row, column)
                for document, column in self.chosen(sample)
                for row in range(offsets[document], offsets[document + 1])
            ]
            padding = width - len(wanted)
            assert valid[sample].tolist() == [True] * len(wanted) + [False] * padding
            assert slots[sample].tolist() == [column for _, column in wanted] + [0] * padding
            expected = content[[row for row, _ in wanted]]
            for place, states in enumerate((keys, values)):
                assert torch.equal(states[sample, :, : len(wanted)].transpose(0, 1), expected[:, place])
                assert not states[sample, :, len(wanted) :].any(), "padding is zero, not NaN"


def random_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """Any number of documents in any order, -1 anywhere; documents of one chunk, of all, or between."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = split_up(pick.choice([1, 2, 63, 64, 65, 300]), pick)
    batch, k = pick.choice([1, 2, 3, 17]), pick.choice([1, 2, 16, 17, 40])
    shape = pick.choice(SHAPES)
    documents = torch.full((batch, k), -1)
    for sample in range(batch):
        for column in range(k):
            left = sorted(set(range(len(counts))) - set(documents[sample].tolist()))
            if left and pick.random() < 0.8:
                documents[sample, column] = pick.choice(left)
    content = torch.randn(sum(counts), 2, *shape, generator=generator).to(dtype)
    return Case(documents, counts, content)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("more", [0, 1, 50])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_random_choices(place, dtype, more, seed) -> None:
    """Rows of the documents in ascending order, then zeros, whatever the width is; slots say whose they are."""
    case = random_case(seed, dtype)
    width = case.most + more
    case.check(case.run(place, width), width)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_float8_content(place, dtype, seed) -> None:
    """Numbers of 8 bit times the scale of their chunk's key or value; float32 where no dtype is asked for."""
    case = random_case(20 + seed)
    generator = torch.Generator().manual_seed(seed)
    case.content = (case.content * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    case.scales, case.dtype = torch.rand(*case.content.shape[:2], generator=generator) + 0.1, dtype
    case.check(case.run(place, case.most), case.most)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stored", FLOATING, ids=str)
@pytest.mark.parametrize("wanted", FLOATING, ids=str)
def test_another_dtype(place, stored, wanted) -> None:
    """Rows come rounded to the dtype asked for, or the backend says that it only copies."""
    case = random_case(31, stored)
    case.dtype = wanted
    features = {"content": stored, "dtype": wanted, "multiple": dispatch.alignment(case.content.shape[3])}
    if takes(place, "gather_documents", **features, source="device"):
        case.check(case.run(place, case.most), case.most)
    else:
        assert stored != wanted


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_parts_of_the_chunks(place, dtype) -> None:
    """Each part has the rows of its chunks, to the bit, and zeros in the places of others': wherever it is cut."""
    case = random_case(40, torch.float32)
    case.counts, total = split_up(64, random.Random(0)), 64
    case.content = torch.randn(total, 2, 8, 16, generator=torch.Generator().manual_seed(0)).clamp(-9, 9).to(dtype)
    case.documents = torch.tensor([[len(case.counts) - 1, -1, 0, len(case.counts) // 2], [-1, -1, 1, -1]])
    if dtype == torch.float8_e4m3fn:
        case.scales = torch.rand(total, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    backend, device = place
    width = case.most + 3
    whole = case.run(place, width)
    case.check(whole, width)
    for cuts in ((0, 31, 64), (0, 0, 5, 64, 64), (0, 64)):
        sums = [torch.zeros_like(states) for states in whole[:2]]
        for first, end in itertools.pairwise(cuts):
            found = gather_documents(
                case.documents.to(device),
                offsets_of(case.counts).to(device),
                surrounded(case.content[first:end], device),
                width,
                scales=None if case.scales is None else surrounded(case.scales[first:end], device),
                first=first,
                backend=backend,
            )
            assert torch.equal(found[2].cpu(), whole[2]) and torch.equal(found[3].cpu(), whole[3])
            for total_, states in zip(sums, found[:2], strict=True):
                assert not (total_.bool() & states.cpu().bool()).any()
                total_ += states.cpu()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(sums, whole[:2], strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_chosen(place) -> None:
    """No documents, -1 alone, no columns, no samples, no rows asked for: padding or nothing, no failure."""
    content = torch.randn(5, 2, 2, 8)
    for documents in (torch.full((3, 4), -1), torch.empty(3, 0, dtype=torch.int64), torch.empty(0, 4).long()):
        for width in (0, 7):
            case = Case(documents, [2, 3], content)
            case.check(case.run(place, width), width)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("on", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_content_of_no_documents(place, on, dtype) -> None:
    """Memory of no bytes may have no address; what is returned is all padding."""
    backend, device = place
    there = device if on == "device" else "cpu"
    if not takes(place, "gather_documents", content=dtype, dtype=torch.bfloat16, multiple=8, source=on):
        return
    content = torch.empty(0, 2, 2, 8, device=there).to(dtype)
    scales = torch.empty(0, 2, device=there) if dtype == torch.float8_e4m3fn else None
    documents, offsets = torch.full((2, 3), -1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with poisoned_memory():
        found = gather_documents(documents, offsets, content, 4, scales=scales, dtype=torch.bfloat16, backend=backend)
    assert [tuple(part.shape) for part in found] == [(2, 2, 4, 8), (2, 2, 4, 8), (2, 4), (2, 4)]
    assert not any(part.any() for part in found)


def test_a_width_below_the_rows_is_refused_on_the_cpu() -> None:
    case = random_case(2)
    for name, _ in (place.values[0] for place in places("gather_documents", "cpu")):
        with pytest.raises((ValueError, RuntimeError), match="`width`"):
            case.run((name, "cpu"), case.most - 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("quantized", [True, False])
def test_opcheck(place, quantized) -> None:
    """Schema, fake and autograd registration are what torch.library asks for."""
    backend, device = place
    case, scales = random_case(3), None
    if quantized:
        case.content, scales = case.content.to(torch.float8_e4m3fn), torch.rand(case.content.shape[:2]).to(device)
    name = dispatch.BACKENDS[backend].namespace
    arguments: tuple[Any, ...] = (case.documents.to(device), offsets_of(case.counts).to(device))
    arguments += (case.content.to(device), scales, case.most + 2, None)
    # The other two checks compute with the inputs, which PyTorch cannot in float8.
    some: dict[str, Any] = {"test_utils": ("test_autograd_registration", "test_faketensor")} if quantized else {}
    torch.library.opcheck(dispatch.operator("gather_documents", name).default, arguments, **some)


@pytest.mark.parametrize("place", PLACES)
def test_compiled_without_a_break(place) -> None:
    """torch.compile(fullgraph=True), with sizes that change, gives the eager answer."""
    backend, device = place

    def gather(documents: Tensor, offsets: Tensor, content: Tensor, width: int) -> tuple[Tensor, ...]:
        keys, values, valid, slots = gather_documents(documents, offsets, content, width, backend=backend)
        return keys * 2, values + 1, ~valid, slots

    torch.compiler.reset()
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 5):
        case = random_case(seed)
        arguments = [item.to(device) for item in (case.documents, offsets_of(case.counts), case.content)]
        for ours, theirs in zip(compiled(*arguments, case.most), gather(*arguments, case.most), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_it_says_that_it_has_no_derivative(place) -> None:
    """A backward through the rows raises, and says what is the matter."""
    backend, device = place
    content = torch.randn(3, 2, 1, 8, device=device, requires_grad=True)
    documents, offsets = torch.tensor([[1]], device=device), offsets_of([1, 2]).to(device)
    keys, *_ = gather_documents(documents, offsets, content, 2, backend=backend)
    with pytest.raises(RuntimeError, match="gather_documents is inference only"):
        keys.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"documents": torch.zeros(1, 2)}, r"`documents` must be \[B, n\] int64"),
        ({"offsets": torch.tensor([0, 1], dtype=torch.int32)}, r"`offsets` must be \[N \+ 1\] int64"),
        ({"content": torch.zeros(3, 1, 8)}, r"`content` must be \[C, 2, G, D\]"),
        ({"scales": torch.ones(3, 2)}, "`scales` belong to float8_e4m3fn content"),
        ({"content": torch.zeros(3, 2, 1, 8).to(torch.float8_e4m3fn)}, "`scales` belong to float8_e4m3fn content"),
        (
            {"content": torch.zeros(3, 2, 1, 8).to(torch.float8_e4m3fn), "scales": torch.ones(3)},
            r"`scales` must be \[3, 2\]",
        ),
        ({"width": -1}, "`width` must be at least 0"),
    ],
    ids=str,
)
def test_contradictions_are_refused(change, said) -> None:
    arguments = {
        "documents": torch.tensor([[0, 1]]),
        "offsets": offsets_of([1, 2]),
        "content": torch.zeros(3, 2, 1, 8),
        "width": 3,
    }
    with pytest.raises(ValueError, match=said):
        gather_documents(**{**arguments, **change})


@pytest.mark.parametrize("place", places("gather_documents", "cuda"))
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_content_in_host_memory(place, pinned, quantized) -> None:
    """Content that lies in host memory, pinned or not, arrives as from the device, or is refused with the reason."""
    case = random_case(4, torch.bfloat16)
    device = place[1]
    if quantized:
        case.content, case.dtype = case.content.to(torch.float8_e4m3fn), torch.bfloat16
        case.scales = torch.rand(case.content.shape[:2]) + 0.1
    features = {"content": case.content.dtype, "dtype": torch.bfloat16, "source": "pinned" if pinned else "host"}
    if not takes(place, "gather_documents", **features, multiple=dispatch.alignment(case.content.shape[3])):
        assert not pinned, "kernels read pinned memory"
        return
    content, scales = case.content, case.scales
    if pinned:
        content, scales = content.pin_memory(), None if scales is None else scales.pin_memory()
    found = gather_documents(
        case.documents.to(device),
        offsets_of(case.counts).to(device),
        content,
        case.most,
        scales=scales,
        dtype=case.dtype,
        backend=place[0],
    )
    case.check(tuple(item.cpu() for item in found), case.most)


@pytest.mark.parametrize("place", places("gather_documents", "cuda"))
def test_a_width_below_the_rows_writes_nothing_beside(place) -> None:
    """What does not fit is left out; the rest is right."""
    case = random_case(6)
    width = case.most - 1
    keys, values, valid, slots = case.run(place, width)
    full_keys, full_values, full_valid, full_slots = case.run(place, case.most)
    assert torch.equal(keys, full_keys[:, :, :width]) and torch.equal(values, full_values[:, :, :width])
    assert torch.equal(valid, full_valid[:, :width]) and torch.equal(slots, full_slots[:, :width])


@pytest.mark.parametrize("place", places("gather_documents", "cuda"))
def test_in_a_graph_and_on_a_side_stream(place) -> None:
    """Captured once, replayed with other documents: no look at the host, and the stream that is current."""
    backend, device = place
    if backend == "pytorch":
        return  # the reference waits for the device
    case = random_case(5)
    width = 40 * max(case.counts)
    documents, offsets = case.documents.to(device), offsets_of(case.counts).to(device)
    content = case.content.to(device)
    gather_documents(documents, offsets, content, width, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gather_documents(documents, offsets, content, width, backend=backend)
    for shift in (1, 2):
        other = Case(case.documents.roll(shift, 0), case.counts, case.content)
        documents.copy_(other.documents.to(device))
        graph.replay()
        torch.cuda.synchronize()
        other.check(tuple(item.cpu() for item in found), width)


@pytest.mark.parametrize("place", places("gather_documents", "cuda"))
def test_on_a_device_that_is_not_the_current_one(place) -> None:
    """Tensors on the last GPU while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = random_case(7, torch.bfloat16)
    case.check(case.run((place[0], f"cuda:{torch.cuda.device_count() - 1}"), case.most), case.most)
