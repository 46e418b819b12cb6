"""Train the small checkpoint of this repository: `msa-hf-tiny`.

    python scripts/train_tiny.py tokenizer --out build/tiny/tokenizer
    python scripts/train_tiny.py dense --tokenizer build/tiny/tokenizer --minutes 3 --out build/tiny/dense
    python scripts/train_tiny.py memory --base build/tiny/dense --minutes 9 --out build/tiny/memory
    python scripts/train_tiny.py sharpen --model build/tiny/memory --out build/tiny/sharp

All of it, with measurements, is one command: `bash scripts/make_tiny.sh OUT`.

First a plain Qwen3 learns to read: texts in the prompt, questions about them. Then it gets a memory and learns the
whole protocol: to route, to name documents from their pooled keys and values, to read what is appended, and to answer.
Every batch is a small corpus of its own, made by `msa_hf.synthetic.corpora`, so no name is ever seen twice; most are
as crowded with near-misses as a corpus many times as large. Last, the score biases are fitted to a bank that is as
crowded as one of a million documents.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_chains import ChainRows, chain_corpus
from tiny_needles import NeedleRows, needle_corpus
from tiny_rows import TINY, UNLABELLED, Pieces, Row, Rows, encode_all, symbols_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from msa_hf import MSAForCausalLM
from msa_hf.bench.chains import ROUNDS
from msa_hf.evaluation import UNANSWERABLE, exact_match, make_corpus
from msa_hf.generation import MemoryInterleave
from msa_hf.model.modes_msa import evaluating
from msa_hf.synthetic.chain_corpora import make_chain_corpus
from msa_hf.synthetic.corpora import QuestionKind
from msa_hf.synthetic.kinds import CHAIN_KINDS
from msa_hf.synthetic.needle_corpora import NeedleCorpus
from msa_hf.synthetic.prose import prose_documents
from msa_hf.training import CollapseGuard, diagnose, router_recall, sharpen_score_bias
from msa_hf.training.compiling import compiled_layers

VOCABULARY = 8192
PAD = "<|pad|>"
LONGEST_PROSE = 116  # tokens, as long as the longest of the other documents, so that pools need little padding
PROSE = "prose.json"  # what is installed here, kept so that a run on another machine reads the same
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
}
IDS = 1_000_000
# A step of the memory phase is of one kind: (documents of its pool, rows, tokens of a row). Shapes stay the
# same from step to step, because kernels are chosen anew for every new one.
KINDS = {
    "naming": (1024, 384, 40),
    "following": (768, 144, 512),
    "second": (512, 160, 512),
    "chains": (512, 112, 640),
    "studying": (384, 72, 1024),
    "reading": (384, 96, 768),
    "needle_rounds": (512, 112, 640),
    "needles": (384, 72, 1024),
}
# How often a kind comes: rounds of many hops and needles are learned more slowly than what one or two documents say,
# and reading is forgotten where it comes seldom (its loss rose from .02 to .12 at one in ten).
TURNS = {
    "naming": 1,
    "following": 2,
    "second": 1,
    "chains": 2,
    "studying": 4,
    "reading": 2,
    "needle_rounds": 2,
    "needles": 2,
}
# Kind -> what makes its corpus and its rows, where that is not `make_corpus` and `Rows`.
MAKERS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("chains", "following", "studying", "dense_chains"), (chain_corpus, ChainRows)),
    **dict.fromkeys(("needles", "needle_rounds", "dense_needles"), (needle_corpus, NeedleRows)),
}
NARROW = 64  # tokens; rows of so few are not told apart
# The width of pools is a multiple of this.
POOL_STEP = 16
CROWDING = (1, 100, 1000, 5000)


# Tokens ---------------------------------------------------------------------------------------------------------------


def train_tokenizer(out: Path, documents: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit and punctuation mark stands alone, so that transcripts can be composed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = make_corpus(documents, seed=12345)
    texts = list(corpus.texts(0, documents))
    texts += [question.text for question in corpus.questions(documents // 4, "one_hop", seed=1)]
    texts += [question.text for question in corpus.questions(documents // 8, "two_hop", seed=2)]
    needles = NeedleCorpus(1024, seed=12345)
    texts += needles.texts() + [question.text for question in needles.questions]
    chains = chain_corpus(max(documents // 5, 60), seed=3)
    texts += [*chains.texts(), *(question.text for question in chains.questions)]
    prose = prose_documents(4000, seed=7, words=55)
    texts += prose
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, *TINY.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TINY.answer_end,
        padding_side="left",
        model_max_length=SHAPE["max_position_embeddings"],
    )
    fast.save_pretrained(out)
    TINY.save_pretrained(out)
    short = [text for text, ids in zip(prose, encode_all(fast, prose), strict=True) if len(ids) <= LONGEST_PROSE]
    Path(out, PROSE).write_text(json.dumps(short))
    return fast


# Batches --------------------------------------------------------------------------------------------------------------


class Batches(IterableDataset):
    """Endless batches, each about a small corpus of its own.

    Args:
        tokenizer: directory of the tokenizer.
        prose: real texts to mix in.
        kinds: what batches are, in turns (`TURNS`): "dense", or those of `KINDS`; documents, rows and tokens of each.
            Rows that are longer are left out.
        seed: of the whole run.
        fixed: whether every batch is padded to its kind's width, so that kernels are not chosen anew for each.
    """

    def __init__(
        self, tokenizer: str, prose: list[str], kinds: dict[str, tuple[int, int, int]], seed: int, fixed: bool = True
    ) -> None:
        self.directory, self.prose, self.kinds, self.seed, self.fixed = tokenizer, prose, kinds, seed, fixed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        symbols = symbols_of(tokenizer)
        names = [kind for kind in self.kinds for _ in range(TURNS.get(kind, 1))]
        while True:
            yield self.batch(tokenizer, symbols, names[number % len(names)], self.seed * 1_000_003 + number)
            number += step

    def batch(self, tokenizer: Any, symbols: dict[str, int], kind: str, seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        documents, count, width = self.kinds[kind]
        options: dict[str, Any] = {"alike_share": draw.choice((0.15, 0.5)), "crowding": draw.choice(CROWDING)}
        options |= {"prose": self.prose, "prose_share": 0.1 if kind.startswith("dense") else 0.2, "seed": seed}
        make, rows_of = MAKERS.get(kind, (make_corpus, Rows))
        corpus = make(documents, **options)
        texts = encode_all(tokenizer, [f" {text}" for text in corpus.texts()])
        pieces = Pieces(texts, draw.sample(range(IDS), documents), symbols)
        maker = rows_of(tokenizer, corpus, pieces, draw, not kind.startswith("dense"))
        rows, width = short_or_long(getattr(maker, kind)(3 * count), count, width, draw)
        batch = {**self.collate(rows, width if self.fixed else None), "kind": kind}
        if not kind.startswith("dense"):
            pool = [pieces.document(place) for place in range(documents)]
            width = -(-max(map(len, pool)) // POOL_STEP) * POOL_STEP
            batch["documents"] = {
                "input_ids": torch.tensor([document + [0] * (width - len(document)) for document in pool]),
                "attention_mask": torch.tensor(
                    [[1] * len(document) + [0] * (width - len(document)) for document in pool]
                ),
            }
        return batch

    @staticmethod
    def collate(rows: list[Row], width: int | None) -> dict[str, Any]:
        width = width or max(len(row.ids) for row in rows)
        most = max(max(len(row.positives) for row in rows), 1)

        def padded(values: list[Any], size: int, fill: Any) -> list[Any]:
            return [*values, *([fill] * (size - len(values)))]

        return {
            "input_ids": torch.tensor([padded(row.ids, width, 0) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.ids), width, 0) for row in rows]),
            "labels": torch.tensor([padded(row.labels, width, UNLABELLED) for row in rows]),
            "routing_mask": torch.tensor([padded(row.routes, width, False) for row in rows]),
            "positive_docs": torch.tensor([padded(row.positives, most, -1) for row in rows]),
        }


def short_or_long(rows: list[Row], count: int, width: int, draw: random.Random) -> tuple[list[Row], int]:
    """Rows of a batch and its width: `count` that are longer than half of `width`, or twice as many of half the width.

    Most rows are short, and padding costs as much as tokens do. Both are seen as often as they are made, by how often a
    batch is of short ones. Where `width` is small, all are of one kind.
    """
    rows = [row for row in rows if len(row.ids) <= width]
    if width <= NARROW:
        return rows[:count], width
    short = [row for row in rows if len(row.ids) <= width // 2]
    share = len(short) / len(rows)
    if draw.random() < share / (2 - share):
        return short[: 2 * count], width // 2
    return [row for row in rows if len(row.ids) > width // 2][:count], width


def loader(arguments: Any, kinds: dict[str, tuple[int, int, int]], seed: int) -> Iterator[dict[str, Any]]:
    prose = json.loads(Path(arguments.tokenizer, PROSE).read_text())
    data = Batches(str(arguments.tokenizer), prose, kinds, seed, fixed=arguments.device == "cuda")
    return iter(
        DataLoader(
            data,
            batch_size=None,
            num_workers=arguments.workers,
            prefetch_factor=4 if arguments.workers else None,
            pin_memory=arguments.device == "cuda",
        )
    )


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor)
        else to_device(value, device)
        if isinstance(value, dict)
        else value
        for name, value in batch.items()
    }


class Clock:
    """The time that a run may take, from its first step on, and a learning rate over it: a rise, level, a fall to 5 %.

    Args:
        minutes: of the run.
        rise, fall: shares of it.
    """

    def __init__(self, minutes: float, rise: float = 0.03, fall: float = 0.5) -> None:
        self.seconds, self.rise, self.fall = minutes * 60, rise, fall
        self.start: float | None = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.time()
        yield
        if self.start is not None:
            self.start += time.time() - began

    def tick(self) -> None:
        """A step is done. The first ones compile, which does not count."""
        self.start = self.start or time.time()

    @property
    def elapsed(self) -> float:
        return time.time() - self.start if self.start else 0.0

    @property
    def progress(self) -> float:
        return self.elapsed / self.seconds

    def rate(self, peak: float) -> float:
        up = max(self.progress / self.rise, 0.01) if self.rise else 1.0
        down = (1 - self.progress) / self.fall if self.fall else 1.0
        return peak * max(min(up, down, 1.0), 0.05 if down < 1 else 0.01)


# Dense ----------------------------------------------------------------------------------------------------------------


def write_curve(curve: list[dict[str, float]], out: str, name: str) -> None:
    Path(out, name).write_text("\n".join(map(json.dumps, curve)) + "\n")


def train_dense(arguments: Any) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    symbols = symbols_of(tokenizer)
    config = Qwen3Config(
        vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=symbols["<|end|>"], bos_token_id=None, **SHAPE
    )
    model = Qwen3ForCausalLM(config).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=arguments.device == "cuda"
    )
    backbone, head = model.model, model.lm_head
    backbone_run = torch.compile(backbone) if arguments.compile else backbone
    shape = (arguments.documents, arguments.rows, arguments.width)
    data = loader(arguments, {"dense": shape, "dense_chains": shape, "dense_needles": shape}, arguments.seed)
    curve: list[dict[str, float]] = []
    clock, step, tokens = Clock(arguments.minutes, fall=0.4), 0, 0
    while clock.progress < 1:
        batch = to_device(next(data), arguments.device)
        ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"][:, 1:].bool()
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(arguments.rate)
        with torch.autocast(arguments.device, torch.bfloat16):
            hidden = backbone_run(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            # Answers, and at a lower weight all tokens of the texts: repeated names teach copying.
            asked = labels[:, 1:] != UNLABELLED
            answer = torch.nn.functional.cross_entropy(head(hidden[asked]).float(), labels[:, 1:][asked])
            rest = real & ~asked & (torch.rand(real.shape, device=real.device) < 0.25)
            text = torch.nn.functional.cross_entropy(head(hidden[rest]).float(), ids[:, 1:][rest])
        optimizer.zero_grad(set_to_none=True)
        (answer + 0.3 * text).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick()
        step, tokens = step + 1, tokens + ids.numel()
        if step % arguments.every == 0:
            row = {"step": step, "seconds": clock.elapsed, "answer": answer.item(), "text": text.item()}
            row |= {"norm": norm.item(), "tokens_per_s": tokens / clock.elapsed}
            curve.append(row)
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out, max_shard_size="14MB")
    tokenizer.save_pretrained(arguments.out)
    TINY.save_pretrained(arguments.out)
    write_curve(curve, arguments.out, "curve_dense.jsonl")


# Memory ---------------------------------------------------------------------------------------------------------------


def bank_to_ask(
    tokenizer: Any, documents: int, questions: int, **corpus_options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents under random ids, as `encode_documents` takes them, and questions of each kind, as `diagnose` does."""
    corpus = make_corpus(documents, **corpus_options)
    ids = random.Random(1).sample(range(IDS), documents)
    rows = [TINY.document_row(id, text, tokenizer) for id, text in zip(ids, corpus.texts(), strict=True)]
    kinds: tuple[QuestionKind, ...] = ("one_hop", "two_hop", "unanswerable")
    asked = [
        {
            "question": question.text,
            "answer": question.answer,
            "kind": kind,
            "positives": [str(ids[place]) for place in question.positives],
        }
        for kind in kinds
        for question in corpus.questions(questions, kind, seed=5)
    ]
    return rows, asked


class Gate:
    """A diagnosis on a bank of thousands of documents with names never trained on, and chains in another one, as often
    as asked for.

    Stops a run that has collapsed.
    """

    def __init__(self, tokenizer: Any, prose: list[str], documents: int, questions: int) -> None:
        self.rows, self.questions = bank_to_ask(
            tokenizer, documents, questions, seed=99, split="test", prose=prose, prose_share=0.2, crowding=100
        )
        counts = dict.fromkeys(CHAIN_KINDS, max(questions // 4, 1))
        self.chains = make_chain_corpus(max(documents // 2, 120), counts, seed=99, split="test", crowding=100)
        self.tokenizer, self.guard = tokenizer, CollapseGuard()
        self.conditions = ["routed", "forced_gold", "gold_text", "no_memory", "ids"]
        if importlib.util.find_spec("bm25s"):
            self.conditions.append("bm25")
        else:
            print("bm25s is not installed: the gate does without it", flush=True)

    def measure(self, model: Any) -> dict[str, float]:
        options: dict[str, Any] = {"protocol": TINY, "show_progress": False}
        with torch.compiler.set_stance("force_eager"):  # what was compiled for training is no help here
            bank = model.encode_documents(self.rows, batch_tokens=65536, show_progress=False)
            found = diagnose(
                model,
                self.tokenizer,
                bank,
                self.questions,
                conditions=self.conditions,
                refusal=UNANSWERABLE,
                batch_size=64,
                max_new_tokens=24,
                interleave={"max_id_tokens": 24},
                **options,
            )
            second = router_recall(model, self.tokenizer, bank, self.questions, protocol=TINY, rounds_read=1)
        assert found.router is not None
        row: dict[str, float] = {}
        for layer in found.router["layers"]:
            row[f"first_{layer}@16"] = found.router["first_layers"][layer]
            row[f"first_{layer}@1"] = found.router["first_layers_at_1"][layer]
            row[f"first_{layer}_distinct"] = found.router["distinct"][layer]
            row[f"second_{layer}@16"] = second["first_layers"][layer]
            row[f"second_{layer}@1"] = second["first_layers_at_1"][layer]
        for condition, by_kind in found.answers.items():
            row |= {f"{condition}_{kind}": item.exact for kind, item in by_kind.items() if kind != "all"}
        row |= {f"ids_{way}": shares["all"] for way, shares in found.ids.items()}
        row["empty"] = found.answers["routed"]["all"].empty
        row |= self.measure_chains(model)
        self.guard.check(found.router, empty=row["empty"])
        return row

    def measure_chains(self, model: Any) -> dict[str, float]:
        """Kind -> share of right answers; all twins are one kind."""
        asked = self.chains.questions
        right: dict[str, list[bool]] = {}
        with torch.compiler.set_stance("force_eager"), evaluating(model):
            rows = TINY.encode_corpus(self.chains.texts(), self.tokenizer)
            bank = model.encode_documents(rows, batch_tokens=65536, show_progress=False)
            asker = MemoryInterleave(model, self.tokenizer, bank, TINY, max_rounds=ROUNDS, max_new_tokens=24)
            answers = asker.ask([question.text for question in asked], batch_size=64)
        for question, answer in zip(asked, answers, strict=True):
            kind = "twins" if question.broken else question.kind
            right.setdefault(f"chains_{kind}", []).append(exact_match(answer.text, question.answer))
        return {kind: sum(each) / len(each) for kind, each in right.items()}


def train_memory(arguments: Any) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    goes_on = AutoConfig.from_pretrained(arguments.base).model_type == "msa"  # where an earlier run stopped
    if goes_on:
        model = MSAForCausalLM.from_pretrained(arguments.base, **options)
    else:
        model = MSAForCausalLM.from_base(arguments.base, score_bias=True, chunk_size=64, top_k=16, **options)
    model.to(arguments.device)
    model.train()
    gate = Gate(tokenizer, json.loads(Path(arguments.tokenizer, PROSE).read_text()), arguments.gate, arguments.asked)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    others = [p for name, p in model.named_parameters() if "router" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": others, "peak": arguments.rate}, {"params": routers, "peak": arguments.router_rate}],
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=arguments.device == "cuda",
    )
    kinds = {
        kind: (max(round(documents * arguments.scale), 48), max(round(rows * arguments.scale), 2), width)
        for kind, (documents, rows, width) in KINDS.items()
        if kind in arguments.kinds
    }
    data = loader(arguments, kinds, arguments.seed + 1)
    curve: list[dict[str, float]] = []
    clock, step, checks = Clock(arguments.minutes, fall=arguments.fall), 0, 0
    last: dict[str, Any] = {}
    while clock.progress < 1:
        with clock.stopped():
            row = {"step": step, "seconds": clock.elapsed, **gate.measure(model)}
            if step:  # what stops a run for good then costs what was trained since
                save(model, tokenizer, arguments.out)
        curve.append(row)
        print("gate", " ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        checks += 1
        with compiled_layers(model) if arguments.compile else contextlib.nullcontext():
            while clock.progress < 1 and clock.elapsed < checks * arguments.gate_every:
                batch = to_device(next(data), arguments.device)
                for group in optimizer.param_groups:
                    group["lr"] = clock.rate(group["peak"])
                warm = not goes_on and clock.progress < arguments.warmup
                model.config.lm_loss_weight, model.config.aux_loss_weight = (0.1, 1.0) if warm else (1.0, arguments.aux)
                kind = batch.pop("kind")
                with torch.autocast(arguments.device, torch.bfloat16):
                    output = model(**batch)
                optimizer.zero_grad(set_to_none=True)
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                clock.tick()
                step += 1
                last[kind], last[f"aux_{kind}"] = output.lm_loss, output.aux_loss
                if step % arguments.every == 0:
                    row = {"step": step, "seconds": clock.elapsed} | {
                        name: value.item() for name, value in last.items()
                    }
                    curve.append(row)
                    print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    save(model, tokenizer, arguments.out)  # before measuring, which takes a while
    curve.append({"step": step, "seconds": clock.elapsed, **gate.measure(model)})
    print("gate", " ".join(f"{k} {v:.4g}" for k, v in curve[-1].items()), flush=True)
    write_curve(curve, arguments.out, "curve_memory.jsonl")


def save(model: Any, tokenizer: Any, out: str) -> None:
    """Write the checkpoint as it is now, in bfloat16; the model trains on in its own dtype."""
    kept = copy.deepcopy(model).eval().to(torch.bfloat16)
    kept.config.lm_loss_weight, kept.config.aux_loss_weight = 1.0, 0.1
    kept.save_pretrained(out, max_shard_size="14MB")
    tokenizer.save_pretrained(out)
    TINY.save_pretrained(out)


# Score biases ---------------------------------------------------------------------------------------------------------


def sharpen(arguments: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = MSAForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval().to(arguments.device)
    prose = json.loads(Path(arguments.tokenizer, PROSE).read_text())
    crowded: dict[str, Any] = {"crowding": arguments.crowding, "prose": prose, "prose_share": 0.2}
    rows, asked = bank_to_ask(tokenizer, arguments.documents, arguments.questions, seed=arguments.seed, **crowded)
    bank = model.encode_documents(rows, batch_tokens=arguments.batch_tokens)
    options: dict[str, Any] = {"refusal": UNANSWERABLE, "batch_size": 100, "max_new_tokens": 24}
    options |= {"interleave": {"max_id_tokens": 24}, "show_progress": False}
    curve = sharpen_score_bias(model, tokenizer, bank, asked, TINY, arguments.factors, **options)
    for row in curve:
        print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    model.save_pretrained(arguments.out, max_shard_size="14MB")
    tokenizer.save_pretrained(arguments.out)
    TINY.save_pretrained(arguments.out)
    write_curve([{"documents": arguments.documents, **row} for row in curve], arguments.out, "sharpen.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("tokenizer", help="train the tokenizer")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--documents", type=int, default=20_000)
    for name, minutes in (("dense", 3.0), ("memory", 9.0)):
        command = commands.add_parser(name)
        command.add_argument("--out", required=True)
        command.add_argument("--tokenizer", required=True, help="what the first command made")
        command.add_argument("--minutes", type=float, default=minutes, help="behind the first step, which compiles")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=14)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--every", type=int, default=30)
        command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    dense, memory = (commands.choices[name] for name in ("dense", "memory"))
    dense.add_argument("--rows", type=int, default=128)
    dense.add_argument("--width", type=int, default=768, help="tokens of a row")
    dense.add_argument("--documents", type=int, default=512)
    dense.add_argument("--rate", type=float, default=1.5e-3)
    memory.add_argument("--base", required=True, help="of the dense phase, or of a memory phase to go on with")
    memory.add_argument("--rate", type=float, default=1e-3)
    memory.add_argument("--router-rate", type=float, default=1e-3)
    memory.add_argument("--warmup", type=float, default=0.08, help="share of the time with the routers first")
    memory.add_argument("--aux", type=float, default=0.3, help="weight of the auxiliary loss after that")
    memory.add_argument("--fall", type=float, default=0.5, help="share of the time in which rates fall")
    memory.add_argument("--scale", type=float, default=1.0, help="of pools and rows of a step; below 1 to rehearse")
    memory.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of steps (default: all)")
    memory.add_argument("--gate", type=int, default=4096, help="documents of the bank that routing is measured on")
    memory.add_argument("--asked", type=int, default=64, help="questions of each kind there")
    memory.add_argument("--gate-every", type=float, default=100, help="seconds")
    last = commands.add_parser("sharpen", help="fit the score biases to a large bank of names seen in training")
    last.add_argument("--model", required=True)
    last.add_argument("--out", required=True)
    last.add_argument("--tokenizer", required=True, help="what the first command made")
    last.add_argument("--documents", type=int, default=100_000, help="of the bank")
    last.add_argument("--crowding", type=int, default=10, help="near-misses as in a bank so many times as large")
    last.add_argument("--questions", type=int, default=100, help="of each kind")
    last.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    last.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    last.add_argument("--batch-tokens", type=int, default=65_536 if torch.cuda.is_available() else 3072)
    last.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.command == "tokenizer":
        train_tokenizer(arguments.out, arguments.documents)
    elif arguments.command == "dense":
        train_dense(arguments)
    elif arguments.command == "memory":
        train_memory(arguments)
    else:
        sharpen(arguments)


if __name__ == "__main__":
    main()
