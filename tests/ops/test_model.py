"""The model on every backend: it calls the operations where they are for it, and computes what plain PyTorch does."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from battery import why_not
from setups import FEW, Setup, assert_same, batch_of, build, setup, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf.model import attention_msa, chunks_msa
from msa_hf.model.document_rows_msa import ChunkLayout
from msa_hf.ops import BACKENDS, adapters, use_backend

OPERATIONS = ("gather_documents", "pool_chunks", "route_documents")
BACKENDS_HERE = [
    name
    for name, backend in BACKENDS.items()
    if backend.runs_on("cpu") and all(why_not(operation, name, "cpu") is None for operation in OPERATIONS)
]
QUESTIONS = tokens(7, 1, 12, seed=3)
REGISTERED = dict(attention_msa.OPERATIONS)  # by the import alone: no test has run


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """As where the package's operations are not there: in the code of a checkpoint."""
    adapters.unregister()
    try:
        yield
    finally:
        adapters.register()


class Called(TorchDispatchMode):
    """Notes the native operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("msa_hf"):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def of(self, backend: str) -> set[str]:
        """The operations that ran, all of them on this backend."""
        spaces = {name.split(".")[0] for name in self.names}
        assert spaces <= {BACKENDS[backend].namespace}
        return {name.split(".")[1] for name in self.names}


class Indexed(TorchDispatchMode):
    """Notes how many numbers are taken out of tensors by index, of tensors that have groups."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor and args[0].dim() > 1:
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def ask(made: Setup, **arguments: Any) -> Any:
    """A forward over padded questions of which one routes with its first token alone."""
    routes = [[True] * len(question) for question in QUESTIONS]
    routes[0] = [True] + [False] * 6
    with torch.no_grad():
        return made.model(**batch_of(QUESTIONS, routes), memory=made.bank, **arguments)


def assert_same_answers(ours: Any, theirs: Any, mask: Tensor) -> None:
    assert_same(ours.logits[mask], theirs.logits[mask])
    assert list(ours.routing) == list(theirs.routing)
    for layer, found in ours.routing.items():
        assert torch.equal(found.documents, theirs.routing[layer].documents)
        torch.testing.assert_close(found.scores, theirs.routing[layer].scores, atol=1e-5, rtol=1e-5)


# Every field on one family, and every family as it is.
FIELDS = ({"similarity": "dot"}, {"shared_router": True}, {"score_bias": True}, {"top_k": 9}, {"prefix_token_ids": []})
CASES = [*(pytest.param(*item.values, {}, id=item.id) for item in FEW), *(("qwen3", "sdpa", item) for item in FIELDS)]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(("family", "attention", "fields"), CASES)
def test_banks_and_answers(family, attention, fields, backend) -> None:
    """The same bank, choices and logits as in plain PyTorch, and all three operations ran on the backend."""
    with plain_pytorch(), Called() as called:
        expected = build(family, attention, **fields)
        theirs = ask(expected)
    assert called.names == []
    with use_backend(backend), Called() as called:
        found = build(family, attention, **fields)
        ours = ask(found)
    assert called.of(backend) == set(OPERATIONS)
    for layer, memory in found.bank.layers.items():
        for ours_, theirs_ in (
            (memory.pooled_kv, expected.bank.layers[layer].pooled_kv),
            (memory.routing_keys, expected.bank.layers[layer].routing_keys),
        ):
            assert ours_.dtype == theirs_.dtype
            assert_same(ours_, theirs_)
    assert_same_answers(ours, theirs, batch_of(QUESTIONS)["attention_mask"].bool())


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("lengths", [[16, 16], [5, 9, 1], [3, 64, 32, 17]])
@pytest.mark.parametrize("across", [False, True], ids=["token by token", "group by group"])
def test_padding_is_no_part_of_a_chunk(backend, lengths, across) -> None:
    """Nor copied away: what stands behind documents, NaN too, is pooled beside them; gradients of it are zero."""
    torch.manual_seed(0)
    shape = (len(lengths), max(lengths), 2, 8)
    states = [torch.randn(shape).transpose(1, 2) for _ in range(2)] + [torch.randn(shape)]
    if across:
        states = [item.contiguous() for item in states[:2]] + states[2:]
    arguments = torch.tensor(lengths), 16, True
    with use_backend(backend):
        leaves = [item.clone().requires_grad_() for item in states]
        sum(part.pow(3).sum() for part in adapters.pool_documents(*leaves, *arguments)).backward()
        plain = [item.clone().requires_grad_() for item in states]
        sum(part.pow(3).sum() for part in chunks_msa.pool_documents(*plain, *arguments)).backward()
        for ours, theirs in zip(leaves, plain, strict=True):
            assert_same(ours.grad, theirs.grad)
        for place, length in enumerate(lengths):
            states[0][place, :, length:] = states[1][place, :, length:] = states[2][place, length:] = torch.nan
        with Indexed() as indexed:
            found = adapters.pool_documents(*states, *arguments)
    for ours, theirs in zip(found, chunks_msa.pool_documents(*states, *arguments), strict=True):
        assert_same(ours, theirs)
    assert backend == "pytorch" or not indexed.sizes


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(backend, dtype) -> None:
    """A bank of 16-bit numbers differs from plain PyTorch's by a rounding at most; choices over one bank do not."""
    with plain_pytorch():
        expected = build()
        expected.model.to(dtype)
        theirs = expected.model.encode_documents(expected.documents, show_progress=False)
    with use_backend(backend):
        ours = expected.model.encode_documents(expected.documents, show_progress=False)
        for layer, memory in ours.layers.items():
            assert memory.pooled_kv.dtype == memory.routing_keys.dtype == dtype
            eps = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(memory.pooled_kv, theirs.layers[layer].pooled_kv, rtol=eps, atol=eps)
            torch.testing.assert_close(memory.routing_keys, theirs.layers[layer].routing_keys, rtol=eps, atol=eps)
        expected.bank = theirs
        found = ask(expected)
    with plain_pytorch():
        plain = ask(expected)
    for layer, routing in found.routing.items():
        assert torch.equal(routing.documents, plain.routing[layer].documents)
        torch.testing.assert_close(routing.scores, plain.routing[layer].scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_encoding_under_autocast(backend) -> None:
    """RoPE leaves keys in float32 beside values in 16 bit: the bank is in 16 bit, as without the operations."""
    found = setup()
    banks = []
    for context in (plain_pytorch(), use_backend(backend)):
        with context, torch.autocast("cpu", torch.bfloat16):
            banks.append(found.model.encode_documents(found.documents, show_progress=False))
    theirs, ours = banks
    for layer, memory in ours.layers.items():
        assert memory.pooled_kv.dtype == memory.routing_keys.dtype == theirs.layers[layer].pooled_kv.dtype
        eps = 2 * torch.finfo(memory.pooled_kv.dtype).eps
        torch.testing.assert_close(memory.pooled_kv, theirs.layers[layer].pooled_kv, rtol=eps, atol=eps)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(
    "arguments",
    [
        {"output_document_scores": True},
        {"force_documents": torch.tensor([[0, -1], [-1, 3], [4, 2]])},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_where_all_scores_are_needed_routing_is_plain(arguments, backend) -> None:
    """Scores of all documents, or of those asked for, do not come from the operation; the answers are the same."""
    found = setup(score_bias=True)
    with plain_pytorch():
        theirs = ask(found, **arguments)
    with use_backend(backend), Called() as called:
        ours = ask(found, **arguments)
    assert called.of(backend) == {"gather_documents"}
    assert_same_answers(ours, theirs, batch_of(QUESTIONS)["attention_mask"].bool())


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_the_last_token_of_each_sample_routes_through_the_operation(backend) -> None:
    """What the last token chooses is what the maximum over it alone does; plain scores tell the same."""
    found = setup(query_reduction="last")
    with plain_pytorch():
        theirs = ask(found)
        scored = ask(found, output_document_scores=True)
    with use_backend(backend), Called() as called:
        ours = ask(found)
    assert called.of(backend) == {"route_documents", "gather_documents"}
    mask = batch_of(QUESTIONS)["attention_mask"].bool()
    assert_same_answers(ours, theirs, mask)
    assert_same_answers(ours, scored, mask)


@pytest.mark.parametrize(
    "reductions", [{"head_reduction": "max"}, {"query_reduction": "mean"}, {"chunk_reduction": "mean"}], ids=str
)
def test_other_reductions_route_plainly(reductions) -> None:
    """The operation knows the default reductions alone."""
    found = setup(**reductions)
    with plain_pytorch():
        theirs = ask(found)
    with Called() as called:
        ours = ask(found)
    assert {name.split(".")[1] for name in called.names} == {"gather_documents"}
    assert_same_answers(ours, theirs, batch_of(QUESTIONS)["attention_mask"].bool())


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_documents_that_a_bank_hides_are_not_chosen(backend) -> None:
    """Hidden from every sample, by the operation itself."""
    found = setup(top_k=2)
    first = ask(found)
    layer = next(iter(first.routing))
    hidden = int(first.routing[layer].documents[0, 0])
    alive = torch.ones(1, len(found.documents), dtype=torch.bool)
    alive[0, hidden] = False
    passes = []

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(kwargs["memory_pass"])
        layout = ChunkLayout(found.bank.offsets, alive)
        passes[-1].layers = {layer: memory.over(layout) for layer, memory in found.bank.layers.items()}

    for module in found.model.modules():
        if hasattr(module, "router_q_proj"):
            module.register_forward_pre_hook(hide, with_kwargs=True, prepend=True)
    with plain_pytorch():
        theirs = ask(found)
    with use_backend(backend), Called() as called:
        ours = ask(found)
    assert passes and "route_documents" in called.of(backend)
    assert all(hidden not in routing.documents for routing in ours.routing.values())
    assert_same_answers(ours, theirs, batch_of(QUESTIONS)["attention_mask"].bool())


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_generation(backend) -> None:
    """Token by token with beams, the same text."""
    found = setup()
    batch = batch_of(QUESTIONS)
    texts = []
    for context in (plain_pytorch(), use_backend(backend)):
        with context:
            texts.append(
                found.model.generate(**batch, memory=found.bank, max_new_tokens=5, num_beams=2, do_sample=False)
            )
    assert torch.equal(*texts)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(
    ("fields", "checkpointing"), [({}, False), ({"score_bias": True}, True), ({"shared_router": True}, True)], ids=str
)
def test_training_pools_on_the_backend(fields, checkpointing, backend) -> None:
    """Pooling and its derivative run there, routing and gathering stay plain; loss and gradients are the same."""
    made = setup(**fields)
    model = made.model
    if checkpointing:
        # Renamed in later versions of transformers.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    batch = batch_of(QUESTIONS, side="right")
    labels = batch["input_ids"].clone()
    labels[:, 0] = -100
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    batch |= {"labels": labels, "documents": made.documents, "positive_docs": torch.tensor([[0], [1], [4]])}

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    with plain_pytorch():
        loss, expected = step()
    with use_backend(backend), Called() as called:
        found_loss, found = step()
    assert called.of(backend) == {"pool_chunks", "pool_chunks_backward"}
    torch.testing.assert_close(found_loss, loss, atol=1e-6, rtol=1e-6)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=2e-6 * largest, rtol=1e-4, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize("score_bias", [True, False])
def test_gradients_of_an_answer_with_a_bank(score_bias) -> None:
    """A backward through a forward with a bank gives what it gives in plain PyTorch, also through the score bias."""
    found = setup(score_bias=score_bias)
    batch = batch_of(QUESTIONS)

    def gradients() -> dict[str, Tensor]:
        found.model.zero_grad()
        output = found.model(**batch, memory=found.bank)
        output.logits[batch["attention_mask"].bool()].square().mean().backward()
        return {name: weight.grad.clone() for name, weight in found.model.named_parameters() if weight.grad is not None}

    with plain_pytorch():
        expected = gradients()
    ours = gradients()
    assert ours.keys() == expected.keys()
    routed = [bool(gradient.any()) for name, gradient in ours.items() if "router_q_proj" in name]
    assert routed and all(routed) == any(routed) == score_bias  # zero where nothing asks for one
    for name, gradient in expected.items():
        assert_same(ours[name], gradient)


@pytest.mark.parametrize("weight", ["router_q_proj", "q_proj"])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_queries_that_are_not_numbers_are_refused(backend, weight) -> None:
    """NaN in a router, or below it, ends the forward and names the first layer it reached."""
    found = setup()
    layer = found.model.config.memory_layers[0]
    place = layer if weight == "router_q_proj" else layer - 1
    with torch.no_grad():
        getattr(found.model.model.layers[place].self_attn, weight).weight[0, 0] = float("nan")
    found.model.accept_bank(found.bank)  # else other weights than the bank was made with are refused
    with use_backend(backend), pytest.raises(ValueError, match=f"router scores of layer {layer} are NaN"):
        ask(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", [name for name, item in BACKENDS.items() if item.runs_on("cuda")])
@pytest.mark.parametrize(("family", "attention"), FEW)
@pytest.mark.parametrize("fields", [{}, {"similarity": "dot"}, {"score_bias": True}], ids=str)
@pytest.mark.parametrize("bank_device", ["cuda", "cpu"])
def test_on_a_gpu(family, attention, fields, backend, bank_device) -> None:
    """Encoding and answering there, with the bank there or in host memory, as in plain PyTorch on the CPU."""
    for operation in OPERATIONS:
        if (reason := why_not(operation, backend, "cuda")) is not None:
            pytest.skip(f"{backend}: {reason}")
    with plain_pytorch():
        found = build(family, attention, **fields)
        theirs = ask(found)
    found.model.to("cuda")
    batch = batch_of(QUESTIONS, [[True] + [False] * 6, [True], [True] * 12])
    batch = {name: item.to("cuda") for name, item in batch.items()}
    with use_backend(backend), torch.no_grad(), Called() as called:
        bank = found.model.encode_documents(found.documents, show_progress=False)
    assert called.of(backend) == {"pool_chunks"}
    # In host memory the bank is routed over and gathered from there, on the backend of the CPU.
    with use_backend(backend if bank_device == "cuda" else None), torch.no_grad(), Called() as called:
        ours = found.model(**batch, memory=bank.to(bank_device))
    assert {name.split(".")[1] for name in called.names} == {"route_documents", "gather_documents"}
    mask = batch["attention_mask"].bool()
    assert_same(ours.logits[mask].cpu(), theirs.logits[mask.cpu()], 1e-4)
    for layer, routing in ours.routing.items():
        assert torch.equal(routing.documents.cpu(), theirs.routing[layer].documents)
        torch.testing.assert_close(routing.scores.cpu(), theirs.routing[layer].scores, atol=1e-4, rtol=1e-4)


def test_unregistered_the_model_is_plain_again() -> None:
    """What stands in the registry is what the flat files put there."""
    ours = REGISTERED
    with plain_pytorch():
        assert all(function.__module__.endswith("_msa") for function in attention_msa.OPERATIONS.values())
        assert attention_msa.OPERATIONS.keys() == ours.keys()
    assert ours == attention_msa.OPERATIONS
    assert not any(function.__module__.endswith("_msa") for function in ours.values())
