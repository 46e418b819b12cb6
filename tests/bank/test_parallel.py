"""A bank shared among processes gives what it gives in one, and no process waits for ever for one that failed."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from connected import together
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model
from setups import Setup, assert_same, batch_of, setup, tokens

from msa_hf import MemoryBank, MSACache
from msa_hf.bank import RankFailed, ShardedBank, shard_bank
from msa_hf.bank.sharded.rankings import merge, pack
from msa_hf.bank.sharded.share import shares
from msa_hf.cli import main
from msa_hf.generation import MemoryInterleave
from msa_hf.model.bank_reader_msa import BankReader
from msa_hf.model.routing_msa import Selection, routing_request, scoring_of, select_documents


@cache
def made(documents: int = 11, **fields: Any) -> Setup:
    """A model and a bank of documents of 1 to 20 tokens in chunks of 3."""
    lengths = torch.randint(1, 21, (documents,), generator=torch.Generator().manual_seed(documents)).tolist()
    return setup(documents=tokens(*lengths, seed=documents), **{"top_k": 3, **fields})


def questions(seed: int = 5, *lengths: int) -> dict[str, torch.Tensor]:
    return batch_of(tokens(*(lengths or (6, 3, 9)), seed=seed))


@torch.no_grad()
def answers(model: Any, memory: Any, **inputs: Any) -> tuple[torch.Tensor, dict[int, tuple[Any, ...]]]:
    output = model(**inputs, memory=memory)
    routing = {layer: (found.documents, found.scores, found.document_scores) for layer, found in output.routing.items()}
    return output.logits, routing


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same documents, and scores and logits up to float32's error."""
    assert ours[1].keys() == theirs[1].keys()
    assert_same(ours[0], theirs[0])
    for layer, (documents, scores, all_scores) in theirs[1].items():
        assert torch.equal(ours[1][layer][0], documents)
        torch.testing.assert_close(ours[1][layer][1], scores, atol=1e-5, rtol=1e-5)
        if all_scores is not None:
            torch.testing.assert_close(ours[1][layer][2], all_scores, atol=1e-5, rtol=1e-5)


each_size = pytest.mark.parametrize("size", [1, 2, 3, 4])


@pytest.mark.parametrize("size, documents", [(1, 11), (2, 1), (3, 2), (4, 5), (4, 11)])
def test_documents_scores_and_logits_are_those_of_one_process(size: int, documents: int) -> None:
    """Also where processes have fewer documents than k, or none."""
    made_ = made(documents)
    expected = answers(made_.model, made_.bank, **questions())

    def work(rank: int) -> Any:
        with shard_bank(made_.bank) as memory:
            return answers(made_.model, memory, **questions()), memory.own_rows

    results = together(size, work)
    for result, _ in results:
        assert_equal(result, expected)
    assert [rows.start for _, rows in results] + [documents] == [0] + [rows.stop for _, rows in results]


@each_size
def test_uneven_batches_of_different_questions(size: int) -> None:
    """Process r asks r batches, of other sizes and lengths than the others' (the first asks nothing)."""
    made_ = made()
    batches = {
        rank: [questions(10 * rank + turn, *range(2 + turn, 3 + rank + 2 * turn)) for turn in range(rank)]
        for rank in range(size)
    }

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs="different") as memory:
            return [answers(made_.model, memory, **batch) for batch in batches[rank]]

    for rank, results in enumerate(together(size, work)):
        assert len(results) == rank
        for result, batch in zip(results, batches[rank], strict=True):
            assert_equal(result, answers(made_.model, made_.bank, **batch))


@pytest.mark.parametrize("inputs", ["same", "different"])
@pytest.mark.parametrize(
    "fields",
    [
        {"score_bias": True, "prefix_token_ids": ()},
        {"similarity": "dot", "head_reduction": "max"},
        {"query_reduction": "last", "chunk_reduction": "mean"},
        {"query_reduction": "mean", "shared_router": True},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_every_kind_of_routing(fields: dict[str, Any], inputs: str) -> None:
    made_ = made(**fields)
    expected = answers(made_.model, made_.bank, **questions())

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            times = 1 + rank if inputs == "different" else 1  # the second one is served by a process without inputs
            return [answers(made_.model, memory, **questions()) for _ in range(times)]

    for results in together(2, work):
        for result in results:
            assert_equal(result, expected)


@pytest.mark.parametrize("fields", [{}, {"query_reduction": "last"}], ids=["max", "last"])
@pytest.mark.parametrize("inputs", ["same", "different"])
def test_scattered_routing_tokens(inputs: str, fields: dict[str, Any]) -> None:
    """Tokens at the end and in between route, other numbers of them in each sample and process."""
    made_ = made(**fields)

    def ask(memory: Any, rank: int) -> Any:
        batch = questions(3, 7, 8, 5)
        pick = torch.Generator().manual_seed(rank if inputs == "different" else 0)
        routes = torch.rand(3, 8, generator=pick) < 0.3
        routes[0, -1] = routes[1, 4] = True
        return answers(made_.model, memory, **batch, routing_mask=routes & batch["attention_mask"].bool())

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            return ask(memory, rank)

    for rank, result in enumerate(together(2, work)):
        assert_equal(result, ask(made_.bank, rank))


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_forced_documents_and_all_scores(inputs: str) -> None:
    """With different inputs one process asks for what the others do not."""
    made_ = made()
    forced = torch.tensor([[10, 0, -1, 4], [2, -1, -1, -1], [-1, -1, -1, -1]])
    wishes = [{"force_documents": forced}, {"output_document_scores": True}, {}]

    def wish(rank: int) -> dict[str, Any]:
        return wishes[rank] if inputs == "different" else {"force_documents": forced, "output_document_scores": True}

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            return answers(made_.model, memory, **questions(), **wish(rank))

    for rank, result in enumerate(together(3, work)):
        assert_equal(result, answers(made_.model, made_.bank, **questions(), **wish(rank)))


@pytest.mark.parametrize("inputs, size", [("same", 1), ("same", 2), ("different", 2), ("different", 4)])
@pytest.mark.parametrize(
    "fields",
    [{}, {"head_reduction": "max", "query_reduction": "last", "chunk_reduction": "mean"}],
    ids=["max", "other"],
)
def test_some_are_given_documents_and_others_route(inputs: str, fields: dict[str, Any], size: int) -> None:
    """More documents than k and fewer, of all processes and of one alone, while others route or only serve."""
    made_ = made(score_bias=True, **fields)
    bank = changed(made_, "0", "5", "6")
    forced = [
        {"force_documents": torch.tensor(rows)}
        for rows in (
            [[7, 0, -1, 4, 2], [2, -1, 3, -1, -1], [-1, -1, -1, -1, -1]],
            [[0], [-1], [0]],
            [[-1, -1], [-1, -1], [-1, -1]],
            [[], [], []],
        )
    ]
    forced[3]["force_documents"] = forced[3]["force_documents"].long()

    def wishes(rank: int) -> list[dict[str, Any]]:
        rank = rank if inputs == "different" else 0
        return [*forced[rank:], {}, *forced[:rank], *([{}] if rank % 2 else [])]

    def work(rank: int) -> Any:
        with shard_bank(bank, inputs=inputs) as memory:
            return [answers(made_.model, memory, **questions(), **wish) for wish in wishes(rank)]

    for rank, results in enumerate(together(size, work)):
        for result, wish in zip(results, wishes(rank), strict=True):
            assert_equal(result, answers(made_.model, bank, **questions(), **wish))


def test_a_process_that_only_serves_hides_its_deleted_documents() -> None:
    made_ = made(top_k=8)
    bank = changed(made_, "0", "1", "9", "10")

    def work(rank: int) -> Any:
        with shard_bank(bank, inputs="different") as memory:
            return [answers(made_.model, memory, **questions()) for _ in range(rank % 2)]

    expected = answers(made_.model, bank, **questions())
    for results in together(3, work):
        for result in results:
            assert_equal(result, expected)


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_generate_with_left_padding_and_beams(inputs: str) -> None:
    """Tokens of processes that generate for different times; decoding needs nobody else."""
    made_ = made()

    def generate(memory: Any, rank: int) -> list[list[int]]:
        seed, length = (rank, 4 + 5 * rank) if inputs == "different" else (0, 6)
        batch, options = questions(seed), {"do_sample": False, "max_new_tokens": length, "eos_token_id": None}
        greedy, beams = (made_.model.generate(**batch, memory=memory, num_beams=n, **options) for n in (1, 3))
        return [*greedy.tolist(), *beams.tolist()]

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            return generate(memory, rank)

    for rank, result in enumerate(together(3, work)):
        assert result == generate(made_.bank, rank)


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_several_turns(inputs: str) -> None:
    """A second turn in which some samples route anew, and a third in which none does."""
    made_ = made()

    @torch.no_grad()
    def converse(memory: Any, rank: int) -> list[torch.Tensor]:
        cache = MSACache(config=made_.model.config)
        model, seed, logits = made_.model, rank if inputs == "different" else 0, []
        for turn, routes in enumerate([[1, 1, 1], [0, 1, 1], [0, 0, 0]]):
            batch = torch.tensor(tokens(4, 4, 4, seed=10 * seed + turn))
            mask = torch.tensor(routes, dtype=torch.bool)[:, None].expand(3, 4)
            output = model(input_ids=batch, memory=memory, routing_mask=mask, past_key_values=cache)
            logits.append(output.logits)
        return logits

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            return converse(memory, rank)

    for rank, result in enumerate(together(2, work)):
        for ours, theirs in zip(result, converse(made_.bank, rank), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_memory_interleave(inputs: str) -> None:
    """Rounds, sources and answers; with different inputs, processes ask different numbers of questions."""
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT, "qwen3")
    bank = bank_of(model, tokenizer, COMPACT)
    asked = ["Where is the amber?", "How far off is the reef, in miles?", "Which one is it?"]

    def ask(memory: Any, rank: int) -> list[Any]:
        interleave = MemoryInterleave(model, tokenizer, memory, COMPACT, max_new_tokens=6, select="router")
        mine = asked[rank:] if inputs == "different" else asked
        return [(answer.text, [source.key for source in answer.documents]) for answer in interleave.ask(mine)]

    def work(rank: int) -> Any:
        with shard_bank(bank, inputs=inputs) as memory:
            return ask(memory, rank)

    for rank, result in enumerate(together(2, work)):
        assert result == ask(bank, rank)
        assert any(documents for _, documents in result)


def changed(made_: Setup, *deleted: str) -> MemoryBank:
    """A bank of which documents were deleted, whose rows still take up room."""
    bank = made_.model.open_memory()
    bank.add([{"key": str(key), "input_ids": document} for key, document in enumerate(made_.documents)])
    for key in deleted:
        bank.delete(key)
    return bank.snapshot()


@pytest.mark.parametrize("inputs", ["same", "different"])
@pytest.mark.parametrize("deleted", [(0, 1, 2, 10), range(11)], ids=["some", "all"])
def test_deleted_documents(deleted: Any, inputs: str) -> None:
    """Also where a process has none left, and where no process has."""
    made_ = made()
    bank = changed(made_, *map(str, deleted))
    expected = answers(made_.model, bank, **questions(), output_document_scores=True)

    def work(rank: int) -> Any:
        with shard_bank(bank, inputs=inputs) as memory:
            routed = answers(made_.model, memory, **questions())
            return routed, answers(made_.model, memory, **questions(), output_document_scores=True), len(memory)

    for routed, scored, count in together(3, work):
        assert_equal(routed, (expected[0], {k: (*v[:2], None) for k, v in expected[1].items()}))
        assert_equal(scored, expected)
        assert count == 11 - len(deleted)


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_a_bank_without_a_row(inputs: str) -> None:
    made_ = made()
    bank = made_.model.open_memory().snapshot()
    assert not len(bank)

    def work(rank: int) -> Any:
        with shard_bank(bank, inputs=inputs) as memory:
            return answers(made_.model, memory, **questions())

    for result in together(2, work):
        assert_equal(result, answers(made_.model, bank, **questions()))


@pytest.mark.parametrize("mutable", [False, True], ids=["saved", "segments"])
def test_from_a_directory_every_process_reads_its_part(
    mutable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those of the whole bank, and a process opens no shard that holds nothing of its part."""
    made_ = made()
    if mutable:
        bank = made_.model.open_memory(tmp_path / "bank")
        for key, document in enumerate(made_.documents):
            bank.add([{"key": str(key), "input_ids": document}])
        bank.delete("3")
        bank.close()
    else:
        made_.bank.save_pretrained(tmp_path / "bank", max_shard_size=2000)
    whole = made_.model.load_memory(tmp_path / "bank")
    expected = answers(made_.model, whole, **questions())
    opened: list[str] = []
    shard = BankReader.shard
    monkeypatch.setattr(BankReader, "shard", lambda *args: (opened.append(args[1]["file"]), shard(*args))[1])

    def work(rank: int) -> Any:
        with shard_bank(tmp_path / "bank", model=made_.model) as memory:
            first, end = memory.own_chunks
            for layer, part in memory.layers.items():
                assert torch.equal(part.routing_keys, whole.layers[layer].routing_keys[first:end])
                assert torch.equal(part.pooled_kv, whole.layers[layer].pooled_kv[first:end])
            return answers(made_.model, memory, **questions()), opened

    results = together(3, work)
    for result, _ in results:
        assert_equal(result, expected)
    everything = {file for _, files in results for file in files}
    assert all(files and len(set(files)) < len(everything) for _, files in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_content_arrives_to_the_bit(dtype: torch.dtype) -> None:
    """In 16 bits too: of what is added, all but one part are zero."""
    made_ = made()
    bank = made_.bank.to(dtype=dtype)
    documents = torch.tensor([[10, 0, 4], [2, -1, 7]])
    offsets = bank.offsets

    def work(rank: int) -> Any:
        with shard_bank(bank) as memory, torch.no_grad():
            config, mask = made_.model.config, documents > 0
            scoring = scoring_of(config, config.similarity)
            request = routing_request(config, scoring, mask, len(bank), documents=documents, inputs=documents)
            with memory.session(request) as layers:
                rows = [layer.gather(Selection(documents, documents.float()), dtype) for layer in layers.values()]
            return [(item.keys, item.values, item.row_mask, item.document_index) for item in rows]

    for result in together(3, work):
        for (keys, values, valid, slots), whole in zip(result, bank.layers.values(), strict=True):
            for sample, row in enumerate(documents.tolist()):
                chosen = sorted(document for document in row if document >= 0)
                chunks = torch.cat([torch.arange(offsets[document], offsets[document + 1]) for document in chosen])
                real = valid[sample]
                assert torch.equal(keys[sample, :, real], whole.keys[chunks].transpose(0, 1))
                assert torch.equal(values[sample, :, real], whole.values[chunks].transpose(0, 1))
                found = [row[slot] for slot in slots[sample, real].tolist()]
                assert found == [item for item in chosen for _ in range(int(offsets[item + 1] - offsets[item]))]


def test_rows_are_bounded_or_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With documents too long for a bound on rows, the same answers come from counted rows."""
    made_ = made()
    monkeypatch.setattr("msa_hf.bank.sharded.session.MOST_UNKNOWN_ROWS", 1)

    def work(rank: int) -> Any:
        with shard_bank(made_.bank) as memory:
            return answers(made_.model, memory, **questions())

    for result in together(2, work):
        assert_equal(result, answers(made_.model, made_.bank, **questions()))


@pytest.mark.parametrize("seed", range(2))
def test_ties_between_processes_go_to_the_lower_document(seed: int) -> None:
    """The k best of every process' k best are the k best of all, whoever has them; scores take few values."""
    pick = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (4,), generator=pick).tolist()
    scores = torch.randint(-2, 3, (3, sum(counts)), generator=pick) * 0.5
    scores[:, ::4] = float("-inf")
    expected = select_documents(scores, 4)
    parts, first = [], 0
    for count in counts:
        documents, best = select_documents(scores[:, first : first + count], 4)
        parts.append(pack(torch.where(documents < 0, documents, documents + first), best))
        first += count
    documents, best = merge(torch.stack(parts), 4)
    assert torch.equal(documents, expected[0])
    assert torch.equal(best, expected[1])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_runs_of_about_as_many_chunks(parts: int) -> None:
    counts = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(parts))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rows = shares(offsets, parts)
    assert rows[0] == 0 and rows[-1] == 40 and rows == sorted(rows)
    sizes = [int(offsets[end] - offsets[first]) for first, end in pairwise(rows)]
    assert all(abs(size - sum(sizes) / parts) <= 8 for size in sizes)


# What goes wrong ------------------------------------------------------------------------------------------------------


class Boom(ArithmeticError):
    """What a model may raise."""


def raises(expected: type[BaseException], work: Callable[[], Any]) -> tuple[str, float]:
    """The message of what `work` raises, and how long it took."""
    start = time.monotonic()
    with pytest.raises(expected) as caught:
        work()
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("inputs", ["same", "different"])
@pytest.mark.parametrize(("failing", "before_last"), [(0, 1), (2, 1), (1, 0)])
def test_an_error_within_a_forward_reaches_all(failing: int, before_last: int, inputs: str) -> None:
    """Between the layers, where the others wait for it, and behind the last exchange of content, where they do not;
    long before the timeout."""
    made_ = made()

    def fail(*_: Any) -> None:
        raise Boom("out of luck")

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            answers(made_.model, memory, **questions())
            if rank == failing:
                layer = sorted(memory.layers)[-1 - before_last]
                made_.model.base_model.layers[layer].mlp.register_forward_pre_hook(fail)
            answer = raises(
                Boom if rank == failing else RankFailed, lambda: answers(made_.model, memory, **questions())
            )
            again = raises(RankFailed, lambda: answers(made_.model, memory, **questions()))[0]
            return *answer, again

    for rank, (message, seconds, again) in enumerate(together(3, work)):
        assert "out of luck" in message and seconds < 10
        assert rank == failing or (f"Process {failing} " in message and "in fail" in message)  # with its traceback
        assert "was closed" in again


@pytest.mark.parametrize("inputs", ["same", "different"])
def test_an_error_between_forwards_reaches_all(inputs: str) -> None:
    """Of a process' own program, in the `with` block, while the others route or are through already."""
    made_ = made()

    def use(rank: int) -> None:
        with shard_bank(made_.bank, inputs=inputs) as memory:
            if rank == 1:
                raise Boom("a file is missing")
            if rank == 0:
                answers(made_.model, memory, **questions())

    def work(rank: int) -> Any:
        return raises(Boom if rank == 1 else RankFailed, lambda: use(rank))

    for message, seconds in together(3, work):
        assert "a file is missing" in message and seconds < 10


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msa_hf.bank.sharded.notices.PATIENCE", 1.0)
    made_ = made()

    def work(rank: int) -> Any:
        with shard_bank(made_.bank) as memory:
            answers(made_.model, memory, **questions())
            if rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return raises(RankFailed, lambda: answers(made_.model, memory, **questions()))

    results = together(3, work, dead=(killed,))
    for rank in {0, 1, 2} - {killed}:
        message, seconds = results[rank]
        assert f"Process {killed} of this shared memory does not answer" in message and seconds < 10


def test_a_process_that_hangs_is_given_up_after_the_timeout() -> None:
    made_ = made()

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, timeout=timedelta(seconds=1)) as memory:
            if rank == 1:
                time.sleep(3)
                return raises(RankFailed, lambda: answers(made_.model, memory, **questions()))
            return raises(RankFailed, lambda: answers(made_.model, memory, **questions()))

    for rank, (message, seconds) in enumerate(together(2, work)):
        assert "Process 1 of this shared memory is alive, but did not come to an exchange" in message
        assert rank == 1 or 0.5 < seconds < 5


def test_different_inputs_are_refused_in_all_where_the_same_were_promised() -> None:
    """Sizes may agree. What comes after works."""
    made_ = made()

    def work(rank: int) -> Any:
        with shard_bank(made_.bank) as memory:
            message, _ = raises(ValueError, lambda: answers(made_.model, memory, **questions(rank)))
            return message, answers(made_.model, memory, **questions())

    for message, result in together(2, work):
        assert 'inputs="different"' in message
        assert_equal(result, answers(made_.model, made_.bank, **questions()))


def test_one_forward_more_than_others_is_refused_where_the_same_were_promised() -> None:
    made_ = made()

    def use(rank: int) -> None:
        with shard_bank(made_.bank) as memory:
            for _ in range(1 + rank):
                answers(made_.model, memory, **questions())

    for message, seconds in together(2, lambda rank: raises(ValueError, lambda: use(rank))):
        assert "finished" in message and seconds < 4


def test_processes_with_different_banks_are_refused() -> None:
    banks = [made(11), made(5)]

    def work(rank: int) -> Any:
        return raises(ValueError, lambda: shard_bank(banks[rank].bank))

    assert all("different banks" in message for message, _ in together(2, work))


def test_what_one_process_cannot_read_is_told_to_all(tmp_path: Path) -> None:
    """A shard that only the second process needs is damaged."""
    made_ = made()
    made_.bank.save_pretrained(tmp_path / "bank", max_shard_size=2000)
    last = max((tmp_path / "bank").glob("layer-*"))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)

    def work(rank: int) -> Any:
        return raises((ValueError, RankFailed), lambda: shard_bank(tmp_path / "bank", model=made_.model))

    assert all(last.name in message and "corrupted" in message for message, _ in together(2, work))


def test_an_argument_that_is_wrong_in_one_process_alone_is_told_to_all() -> None:
    """At once; the processes may then try again."""
    bank = made().bank
    wrong: list[dict[str, Any]] = [{"inputs": "other"}, {"content": "none"}, {"bank": [bank]}]
    wrong.append({"bank": "a-directory", "content": "replicated"})

    def work(rank: int) -> Any:
        found = []
        for arguments in wrong:
            given = {"bank": bank, "timeout": timedelta(seconds=30), **(arguments if rank else {})}
            expected = (ValueError, TypeError) if rank else RankFailed
            found.append(raises(expected, lambda given=given: shard_bank(**given)))
        return found

    for (told, seconds), (own, _) in zip(*together(2, work), strict=True):
        assert own in told and told.startswith("Process 1: ") and seconds < 10


def test_a_bank_of_another_model_is_refused(tmp_path: Path) -> None:
    made().bank.save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError, match="chunk_size"):
        shard_bank(tmp_path / "bank", model=made(chunk_size=4).model)


def test_scores_that_would_need_a_gradient_are_refused() -> None:
    """Where the language-model loss would reach routers through scores of other processes."""
    made_ = made(score_bias=True)
    with shard_bank(made_.bank) as memory, pytest.raises(ValueError, match="no_grad"):
        made_.model(**questions(), memory=memory)


def test_unconnected_processes_are_told_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="Accelerator"):
        shard_bank(made().bank)


def test_one_process_alone_needs_no_group() -> None:
    made_ = made()
    with shard_bank(made_.bank) as memory:
        assert_equal(answers(made_.model, memory, **questions()), answers(made_.model, made_.bank, **questions()))
    assert isinstance(memory, ShardedBank) and (memory.rank, memory.size) == (0, 1)
    assert (memory.num_chunks, memory.num_tokens) == (made_.bank.num_chunks, made_.bank.num_tokens)


def test_a_part_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part of the bank"):
        shard_bank(made().bank).save_pretrained(tmp_path)


# What is written about it ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def launched(rank: int, size: int, program: Callable[[], None]) -> str:
    """What `program` prints as one of the processes that a launcher started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(ACCELERATE_USE_CPU="1", MASTER_ADDR="127.0.0.1")
    with redirect_stdout(io.StringIO()) as printed:
        program()
    return printed.getvalue()


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes answer the two-hop question that it asks, and one of them prints."""
    code = (ROOT / "docs/parallel.md").read_text().split("```python\n# ask.py\n")[1].split("```")[0]
    lines = (ROOT / "examples/quickstart/documents.jsonl").read_text().splitlines(keepends=True)
    keys = ("Jethefux Crossing", "Krikutust Heights", "Kurtultom Compass")
    wanted = [line for line in lines if line.startswith(tuple(f'{{"key": "{key}"' for key in keys))]
    assert len(wanted) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents.jsonl").write_text("".join(wanted))
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    assert main(["encode", "model_cards/msa-hf-tiny", "documents.jsonl", "my-bank"]) == 0
    first, second = together(2, lambda rank: launched(rank, 2, lambda: exec(compile(code, "ask.py", "exec"), {})))
    assert "roses" in first and not second


def test_the_benchmark_chooses_what_one_process_chooses(tmp_path: Path) -> None:
    """A rehearsal; it compares the documents itself."""
    bench = runpy.run_path(str(ROOT / "benchmarks/bench_parallel.py"))
    sizes = """--tokens 20000 --document-tokens 130 --question-tokens 5 --layers 2 --heads 4 --groups 2 --head-dim 8
        --hidden-size 32 --intermediate-size 32 --vocabulary 16384 --batch 2 --questions 2 --documents 9"""
    options = [*sizes.split(), "--part-size", "900", "--repeats", "1", "--json", str(tmp_path / "figures.json")]
    printed = together(2, lambda rank: launched(rank, 2, lambda: bench["main"](options)))
    figures = json.loads((tmp_path / "figures.json").read_text())
    measured = ("route 1 x 5", "route 2 x 5", "first token, 5 tokens")
    named = [f"{what}, {kind}" for kind in ("sharded", "replicated") for what in measured]
    assert [row["what"] for row in figures["rows"]] == [*named, "questions, each its own", "encoding"]
    assert figures["processes"] == 2 and all(row["one"] > 0 and row["all"] > 0 for row in figures["rows"])
    assert printed[0].count(" times (goal ") == len(figures["rows"]) and not any(printed[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_choose_what_one_chooses() -> None:
    """Over NCCL, in float32 and bfloat16; the benchmark compares, and no process group warns."""
    sizes = """--rows route,first,questions --tokens 40000 --question-tokens 5 --layers 2 --heads 4 --groups 2
        --head-dim 64 --hidden-size 64 --intermediate-size 64 --vocabulary 512 --batch 2 --questions 2 --repeats 1
        --no-compile"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "benchmarks/bench_parallel.py"]
    for dtype in ("float32", "bfloat16"):
        options = [*command, *sizes.split(), "--dtype", dtype]
        done = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "device_id" not in done.stderr and "destroy_process_group" not in done.stderr, done.stderr
