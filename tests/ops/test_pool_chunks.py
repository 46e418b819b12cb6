"""`pool_chunks` and its derivative on every backend against the definition in float64."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from battery import FLOATING, around, error_of, offsets_of, places, poisoned_memory, surrounded, takes
from torch import Tensor

from msa_hf.ops import dispatch, pool_chunks

PLACES = places("pool_chunks")
SHAPES = ((1, 8), (2, 8), (8, 16), (1, 64), (8, 128), (3, 40), (2, 256), (32, 64))
SIZES = (1, 2, 3, 16, 63, 64, 65, 128)
# Half of the largest step between neighboring numbers: of int8 in units of the scale, of float8 relative to the number
# or, below 2^-6, in units of the scale.
HALF_STEPS = {torch.int8: (0.5, 0.0), torch.float8_e4m3fn: (2.0**-10, 2.0**-4)}


@dataclass
class Case:
    """Packed documents on the CPU; `counts` tokens each, some none."""

    keys: Tensor
    values: Tensor
    router_keys: Tensor
    counts: list[int]
    size: int

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.router_keys

    @property
    def chunks(self) -> int:
        return sum(-(-count // self.size) for count in self.counts)

    def means(self, states: Tensor) -> Tensor:
        """[C, G, D] in the dtype of `states`."""
        parts = [part for document in states.split(self.counts) for part in document.split(self.size) if len(part)]
        return torch.stack([part.mean(0) for part in parts]) if parts else states.new_empty(0, *states.shape[1:])

    def expected(self, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor]:
        keys, values, router_keys = (self.means(states.to(dtype)) for states in self.states)
        if normalize:
            router_keys = router_keys / (router_keys.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        return torch.stack([keys, values], 1), router_keys.flatten(1)

    def run(
        self, place: tuple[str, str], form: Callable[[Tensor, str], Tensor] = surrounded, **changes: Any
    ) -> tuple[Tensor | None, ...]:
        backend, device = place
        with poisoned_memory():
            found = pool_chunks(
                *(form(states, device) for states in self.states),
                offsets_of(self.counts).to(device),
                self.size,
                backend=backend,
                **changes,
            )
        return tuple(None if item is None else item.cpu() for item in found)


def random_case(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, int] | None = None) -> Case:
    """Documents whose lengths lie around multiples of the chunk size, with empty ones among them."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape, size = pick.choice(SHAPES) if shape is None else shape, pick.choice(SIZES)
    documents = pick.choice([1, 2, 5, 33])
    counts = [around([1, size, 2 * size, 5 * size], pick, least=0) for _ in range(documents)]
    if documents > 2:
        counts[pick.randrange(documents)] = 0
    keys, values, router_keys = (
        (torch.randn(sum(counts), *shape, generator=generator) + 0.3).to(dtype) for _ in range(3)
    )
    return Case(keys, values, router_keys, counts, size)


def close_as_pytorch(found: Tensor, inexact: Tensor, exact: Tensor) -> None:
    """No further from `exact` than twice what PyTorch's float32 result, rounded to the same dtype, is."""
    assert found.shape == exact.shape and bool(found.isfinite().all())
    allowed = 2 * error_of(inexact.to(found.dtype), exact)
    allowed += 4 * torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps * float(exact.abs().max())
    assert error_of(found, exact) <= allowed


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_sizes(place, dtype, normalize, seed) -> None:
    """Means over the real tokens of each chunk; nothing beside the tensors is read, all of the result is written."""
    case = random_case(seed, dtype)
    content, routing_keys, scales = case.run(place, normalize=normalize)
    assert content.dtype == routing_keys.dtype == dtype and scales is None
    for found, inexact, exact in zip(
        (content, routing_keys),
        case.expected(torch.float32, normalize),
        case.expected(torch.float64, normalize),
        strict=True,
    ):
        if exact.numel():
            close_as_pytorch(found, inexact, exact)
        assert found.shape == exact.shape


def transposed(states: Tensor, device: str) -> Tensor:
    """[tokens, G, D] with the groups outermost in memory, as attention lays keys out."""
    return surrounded(states.transpose(0, 1).contiguous(), device).transpose(0, 1)


def apart(states: Tensor, device: str) -> Tensor:
    """[tokens, G, D] as a part of a wider projection."""
    wide = torch.cat([torch.full_like(states, float("nan")), states, torch.full_like(states, float("nan"))], 1)
    return surrounded(wide, device)[:, states.shape[1] : 2 * states.shape[1]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", [transposed, apart])
@pytest.mark.parametrize("seed", range(3))
def test_any_strides(place, form, seed) -> None:
    """States that are views of other layouts give what their dense copies give, to the bit."""
    case = random_case(50 + seed, torch.bfloat16)
    for ours, theirs in zip(case.run(place, form)[:2], case.run(place)[:2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", HALF_STEPS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_quantized_routing_keys(place, kind, normalize, seed) -> None:
    """Scale times number is the mean, rounded to the nearest; the largest number of a chunk uses the whole range."""
    case = random_case(100 + seed, (torch.float32, torch.bfloat16)[seed % 2])
    content, numbers, scales = case.run(place, normalize=normalize, routing_dtype=kind)
    plain, _, _ = case.run(place, normalize=normalize)
    _, exact = case.expected(torch.float64, normalize)
    assert torch.equal(content, plain) and numbers.dtype == kind and numbers.shape == exact.shape
    assert scales.dtype == torch.float32 and scales.shape == exact.shape[:1]
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[kind]
    torch.testing.assert_close(scales.double(), exact.abs().amax(1) / largest, rtol=1e-5, atol=0.0)
    absolute, relative = HALF_STEPS[kind]
    steps = torch.maximum(absolute * scales.double()[:, None], relative * exact.abs())
    assert ((numbers.double() * scales.double()[:, None] - exact).abs() <= steps * (1 + 1e-4)).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("routing_dtype", [None, *HALF_STEPS], ids=str)
def test_zeros_and_nothing(place, routing_dtype) -> None:
    """Chunks of zeros stay zeros, whatever is asked for; documents without tokens leave nothing; no NaN."""
    case = random_case(7, shape=(2, 8))
    zeros = Case(*(torch.zeros_like(states) for states in case.states), case.counts, case.size)
    content, routing_keys, scales = zeros.run(place, routing_dtype=routing_dtype)
    assert not content.any() and not routing_keys.float().any()
    assert scales is None or bool((scales.isfinite() & (scales >= 0)).all())
    for counts in ([], [0], [0, 0, 0]):
        none = Case(*(torch.empty(0, 2, 8) for _ in range(3)), counts, 4)
        content, routing_keys, _ = none.run(place, routing_dtype=routing_dtype)
        assert content.shape == (0, 2, 2, 8) and routing_keys.shape == (0, 16)


@pytest.mark.parametrize("place", PLACES)
def test_the_same_inputs_give_the_same_bits(place) -> None:
    """Twice the same call; and a document alone as among others."""
    case = random_case(11, torch.bfloat16)
    first, second = case.run(place), case.run(place)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    row = 0
    for document, *states in zip(case.counts, *(item.split(case.counts) for item in case.states), strict=True):
        alone = Case(*states, [document], case.size)
        chunks = alone.chunks
        for ours, theirs in zip(alone.run(place)[:2], first[:2], strict=True):
            assert torch.equal(ours, theirs[row : row + chunks])
        row += chunks


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_gradients(place, dtype, normalize, seed) -> None:
    """Gradients are those of the definition in float64, rounded to the inputs' dtype."""
    backend, device = place
    case = random_case(200 + seed, dtype)
    if not case.chunks:
        case = random_case(300 + seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    shapes = [item.shape for item in case.expected(torch.float32, normalize)]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def gradients(kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [states.to(kind).requires_grad_() for states in case.states]
        expected = Case(*leaves, case.counts, case.size).expected(kind, normalize)
        total = sum((item * weight.to(kind)).sum() for item, weight in zip(expected, weights, strict=True))
        return torch.autograd.grad(total, leaves)

    leaves = [surrounded(states, device).requires_grad_() for states in case.states]
    with poisoned_memory():
        found = pool_chunks(
            *leaves, offsets_of(case.counts).to(device), case.size, normalize=normalize, backend=backend
        )
        total = sum((item * weight.to(device)).sum() for item, weight in zip(found[:2], weights, strict=True))
        ours = torch.autograd.grad(total, leaves)
    for gradient, inexact, exact in zip(ours, gradients(torch.float32), gradients(torch.float64), strict=True):
        assert gradient.dtype == dtype
        close_as_pytorch(gradient.cpu(), inexact, exact)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(place, normalize) -> None:
    """The derivative is that of the forward, numerically in float64, also of views and of one output alone."""
    backend, device = place
    if not takes(place, "pool_chunks", states=torch.float64, multiple=1, width=8, routing_dtype=None):
        assert device == "cuda", "in float64 every backend of the CPU"
        return
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 9, 3, generator=generator, dtype=torch.float64, device="cpu") for _ in range(3)]
    leaves = [item.to(device).transpose(0, 1).requires_grad_() for item in states]
    offsets = offsets_of([4, 0, 1, 4]).to(device)

    def pool(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        content, routing_keys, _ = pool_chunks(*inputs, offsets, 3, normalize=normalize, chunks=5, backend=backend)
        return content, routing_keys

    assert torch.autograd.gradcheck(pool, leaves)
    assert torch.autograd.gradcheck(lambda *inputs: pool(*inputs)[1], leaves)


@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_zeros_are_finite(place) -> None:
    """The epsilon lies inside the root."""
    backend, device = place
    leaves = [torch.zeros(5, 2, 8, device=device, requires_grad=True) for _ in range(3)]
    _, routing_keys, _ = pool_chunks(*leaves, offsets_of([5]).to(device), 4, backend=backend)
    routing_keys.sum().backward()
    assert leaves[2].grad is not None and bool(leaves[2].grad.isfinite().all())


@pytest.mark.parametrize("place", PLACES)
def test_quantized_keys_have_no_derivative(place) -> None:
    """A backward through rounding raises, and says what is the matter."""
    backend, device = place
    leaves = [torch.randn(5, 2, 8, device=device, requires_grad=True) for _ in range(3)]
    content, _, _ = pool_chunks(*leaves, offsets_of([5]).to(device), 4, routing_dtype=torch.int8, backend=backend)
    with pytest.raises(RuntimeError, match="pool_chunks is inference only with a `routing_dtype`"):
        content.sum().backward()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("routing_dtype", [None, *HALF_STEPS][:2], ids=str)
def test_opcheck(place, routing_dtype) -> None:
    """Schemas, fakes and autograd registration are what torch.library asks for."""
    backend, device = place
    case = random_case(13, shape=(2, 8))
    name = dispatch.BACKENDS[backend].namespace
    states = [item.to(device).requires_grad_(routing_dtype is None) for item in case.states]
    offsets = offsets_of(case.counts).to(device)
    torch.library.opcheck(
        dispatch.operator("pool_chunks", name).default,
        (*states, offsets, case.size, case.chunks, True, routing_dtype),
    )
    content, routing_keys = (torch.randn_like(item).to(device) for item in case.expected(torch.float32, True))
    if dispatch.BACKENDS[backend].probe("pool_chunks_backward") is None:
        torch.library.opcheck(
            dispatch.operator("pool_chunks_backward", name).default,
            (content, routing_keys, states[2].detach(), offsets, case.size, True),
        )


@pytest.mark.parametrize("place", PLACES)
def test_compiled_without_a_break(place) -> None:
    """torch.compile(fullgraph=True), forward and backward, with sizes that change, gives the eager answer."""
    backend, device = place

    def pool(keys: Tensor, values: Tensor, router_keys: Tensor, offsets: Tensor, chunks: int) -> Tensor:
        content, routing_keys, _ = pool_chunks(keys, values, router_keys, offsets, 4, chunks=chunks, backend=backend)
        return content.square().sum() + routing_keys.exp().sum()

    torch.compiler.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for seed, counts in enumerate(([3, 9], [1, 8, 5], [17])):
        generator = torch.Generator().manual_seed(seed)
        states = [torch.randn(sum(counts), 2, 8, generator=generator).to(device) for _ in range(3)]
        chunks = sum(-(-count // 4) for count in counts)
        results = []
        for function in (compiled, pool):
            leaves = [item.clone().requires_grad_() for item in states]
            total = function(*leaves, offsets_of(counts).to(device), chunks)
            results.append([total.detach(), *torch.autograd.grad(total, leaves)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": torch.zeros(5, 2, 4)}, "of one shape, dtype and device"),
        ({"router_keys": torch.zeros(5, 2, 8).half()}, "of one shape, dtype and device"),
        ({"token_offsets": torch.tensor([0, 5], dtype=torch.int32)}, r"`token_offsets` must be \[N \+ 1\] int64"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"routing_dtype": torch.int16}, "`routing_dtype` must be"),
    ],
    ids=str,
)
def test_contradictions_are_refused(change, said) -> None:
    states = {name: torch.zeros(5, 2, 8) for name in ("keys", "values", "router_keys")}
    with pytest.raises(ValueError, match=said):
        pool_chunks(**{**states, "token_offsets": offsets_of([5]), "chunk_size": 4, **change})


@pytest.mark.parametrize("operation, widest", [("pool_chunks", 16384), ("pool_chunks_backward", 8192)])
def test_the_cuda_kernels_take_what_fits_their_shared_memory(operation, widest) -> None:
    limit = dispatch.OPERATIONS[operation].limits["cuda"]
    assert limit(states=torch.float32, width=widest) is None
    assert str(widest) in limit(states=torch.float32, width=widest + 1)


@pytest.mark.parametrize("place", places("pool_chunks", "cuda"))
def test_on_a_side_stream(place) -> None:
    """On a stream of its own, behind work that is still running there, the answer is the same."""
    backend, device = place
    case = random_case(17, torch.bfloat16, (8, 128))
    expected = case.run(place)
    offsets = offsets_of(case.counts).to(device)
    ready = [states.to(device) for states in case.states]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(states) for states in ready]
        torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream sees zeros
        for target, source in zip(late, ready, strict=True):
            target.copy_(source)
        found = pool_chunks(*late, offsets, case.size, chunks=case.chunks, backend=backend)
    stream.synchronize()
    assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("place", places("pool_chunks", "cuda"))
def test_on_a_device_that_is_not_the_current_one(place) -> None:
    """Tensors on the last GPU while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = random_case(19, torch.bfloat16)
    other = case.run((place[0], f"cuda:{torch.cuda.device_count() - 1}"))
    for ours, theirs in zip(other[:2], case.run(place)[:2], strict=True):
        assert torch.equal(ours, theirs)
