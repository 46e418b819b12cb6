"""Train the small checkpoint of this repository: `msa-hf-tiny`.

    python scripts/train_tiny.py tokenizer --out build/tiny/tokenizer
    python scripts/train_tiny.py dense --tokenizer build/tiny/tokenizer --minutes 9 --out build/tiny/dense
    python scripts/train_tiny.py memory --base build/tiny/dense --minutes 9 --out build/tiny/memory

First a plain Qwen3 learns to read: texts in the prompt, questions about them. Then it gets a memory and learns the
whole protocol: to route, to name documents from their pooled keys and values, to read what is appended, and to answer.
Every batch is a small corpus of its own, made by `msa_hf.evaluation.corpora`, so no name is ever seen twice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from msa_hf import MSAForCausalLM
from msa_hf.evaluation import Question, make_corpus
from msa_hf.evaluation.prose import prose_documents
from msa_hf.generation import COMPACT

VOCABULARY = 8192
PAD = "<|pad|>"
# An answer begins with a space, so that its tokens are those of the text it is copied from.
TINY = replace(COMPACT, answer_opening=" ")
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
UNLABELLED = -100


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
    texts += prose_documents(documents // 8, seed=3)
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
    return fast


@dataclass
class Pieces:
    """Token ids of a small corpus, from which transcripts are put together without tokenizing again."""

    texts: list[list[int]]
    ids: list[int]
    symbols: dict[str, int]

    def number(self, id: int) -> list[int]:
        return [self.symbols["["], *(self.symbols[digit] for digit in str(id)), self.symbols["]"]]

    def document(self, place: int) -> list[int]:
        """`TINY.document`: "[id] text\\n[id]"."""
        number = self.number(self.ids[place])
        return [*number, *self.texts[place], self.symbols["\n"], *number]

    def named(self, places: list[int]) -> list[int]:
        tokens = [token for place in places for token in self.number(self.ids[place])]
        return [*tokens, self.symbols["<|docs|>"]]

    def block(self, places: list[int]) -> list[int]:
        tokens: list[int] = []
        for place in places:
            tokens += [*self.number(self.ids[place]), *self.texts[place], self.symbols["\n"]]
        return [*tokens, self.symbols["<|ids|>"]]


def symbols_of(tokenizer: Any) -> dict[str, int]:
    """Token of each character and marker that transcripts are put together with."""
    names = [*"[]0123456789", "\n"]
    found = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in names}
    assert all(len(ids) == 1 for ids in found.values()), "digits, brackets and line ends must be one token each"
    special = {name: [tokenizer.convert_tokens_to_ids(name)] for name in TINY.special_tokens}
    return {name: ids[0] for name, ids in (found | special).items()}


def encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One training sequence."""

    ids: list[int]
    labels: list[int]
    routes: list[bool]
    positives: list[int]

    def add(self, ids: list[int], labelled: bool = False, routes: bool = False) -> None:
        self.ids += ids
        self.labels += ids if labelled else [UNLABELLED] * len(ids)
        self.routes += [routes] * len(ids)


class Batches(IterableDataset):
    """Endless batches, each about a small corpus of its own.

    Args:
        tokenizer: directory.
        kind: `"dense"` for reading rows alone, `"memory"` for pools with rows of every stage.
        rows: rows per batch (of full transcripts; four times as many short ones).
        documents: documents per corpus.
        width: most tokens of a row; longer ones are left out.
        seed: of the whole run.
    """

    def __init__(self, tokenizer: str, kind: str, rows: int, documents: int, width: int, seed: int) -> None:
        self.directory, self.kind, self.rows, self.documents = tokenizer, kind, rows, documents
        self.width, self.seed = width, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        symbols = symbols_of(tokenizer)
        prose = prose_documents(4000, seed=7)
        while True:
            yield self.batch(tokenizer, symbols, prose, self.seed * 1_000_003 + number)
            number += step

    def batch(self, tokenizer: Any, symbols: dict[str, int], prose: list[str], seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        share = 0.2 if self.kind == "memory" else 0.1
        corpus = make_corpus(self.documents, seed=seed, prose=prose, prose_share=share)
        texts = encode_all(tokenizer, [f" {text}" for text in corpus.texts(0, self.documents)])
        pieces = Pieces(texts, draw.sample(range(IDS), self.documents), symbols)
        if self.kind == "dense":
            rows = self.reading_rows(tokenizer, corpus, pieces, draw, self.rows, extra=5)
            return self.collate(rows, symbols)
        stage = draw.random()
        if stage < 0.4:
            kind, rows = "first", self.naming_rows(tokenizer, corpus, pieces, draw, 4 * self.rows)
        elif stage < 0.7:
            kind, rows = "second", self.second_rows(tokenizer, corpus, pieces, draw, 2 * self.rows)
        else:
            kind, rows = "reading", self.reading_rows(tokenizer, corpus, pieces, draw, self.rows, extra=0)
        batch = {**self.collate(rows, symbols), "kind": kind}
        pool = [pieces.document(place) for place in range(self.documents)]
        width = max(map(len, pool))
        batch["documents"] = {
            "input_ids": torch.tensor([document + [0] * (width - len(document)) for document in pool]),
            "attention_mask": torch.tensor([[1] * len(document) + [0] * (width - len(document)) for document in pool]),
        }
        return batch

    def questions(self, corpus: Any, draw: random.Random, count: int) -> list[Question]:
        kinds = {"one_hop": count - 2 * (count // 4), "two_hop": count // 4, "unanswerable": count // 4}
        questions = [
            question
            for kind, wanted in kinds.items()
            for question in corpus.questions(wanted, kind, seed=draw.randrange(1 << 30))
        ]
        draw.shuffle(questions)
        return questions

    def distractors(self, question: Question, draw: random.Random, count: int) -> list[int]:
        """Documents that do not answer: those whose names share a part first."""
        taken = set(question.positives)
        near = [place for place in question.hard_negatives if place not in taken]
        draw.shuffle(near)
        near = near[: draw.randint(0, count)]
        while len(near) < count:
            place = draw.randrange(self.documents)
            if place not in taken and place not in near:
                near.append(place)
        return near

    def reading_rows(
        self, tokenizer: Any, corpus: Any, pieces: Pieces, draw: random.Random, count: int, extra: int
    ) -> list[Row]:
        """Whole transcripts: question, texts of one or two rounds, answer; and `extra` further questions about them."""
        questions = self.questions(corpus, draw, count)
        coded = encode_all(tokenizer, [question.text for question in questions])
        answers = encode_all(tokenizer, [f" {question.answer}" for question in questions])
        facts = corpus.facts(0, self.documents) if extra else []
        rows, further = [], []
        for question, asked, answer in zip(questions, coded, answers, strict=True):
            row = Row([], [], [], [])
            row.add(asked, routes=True)
            row.add([pieces.symbols["<|ids|>"]])
            rounds = [list(places) for places in question.rounds] or [[]]
            if len(rounds) == 1 and draw.random() < 0.5:
                rounds.append([])  # a second look that finds nothing new
            exact = draw.random() < 0.3 and all(rounds)
            read: list[int] = []
            for place, found in enumerate(rounds):
                others = [] if exact else self.distractors(question, draw, draw.randint(0 if found else 1, 3))
                chosen = [item for item in [*found, *others] if item not in read]
                draw.shuffle(chosen)
                read += chosen
                # Ids of documents that nothing but chance put there cannot be learnt.
                row.add(pieces.named(chosen), labelled=exact and self.kind == "memory")
                last = place == len(rounds) - 1
                row.add(pieces.block(chosen), routes=last)
            row.add([pieces.symbols["<|answer|>"]], labelled=exact and self.kind == "memory")
            row.add([*asked, pieces.symbols["\n"]])
            row.add([*answer, pieces.symbols["<|end|>"]], labelled=True)
            row.positives = [item for item in question.positives if item in read]
            rows.append(row)
            known = [fact for item in read for fact in facts[item]] if extra else []
            for fact in draw.sample(known, min(extra, len(known))):
                further.append((row, draw.choice(fact.questions), fact.answer))
        again = encode_all(tokenizer, [text for _, text, _ in further])
        said = encode_all(tokenizer, [f" {text}" for _, _, text in further])
        for (row, _, _), asked, answer in zip(further, again, said, strict=True):
            row.add([*asked, pieces.symbols["\n"]])
            row.add([*answer, pieces.symbols["<|end|>"]], labelled=True)
        return [row for row in rows if len(row.ids) <= self.width]

    def naming_rows(self, tokenizer: Any, corpus: Any, pieces: Pieces, draw: random.Random, count: int) -> list[Row]:
        """The first round alone: question, and the ids of its documents, or at once the end of retrieval."""
        questions = self.questions(corpus, draw, count)
        coded = encode_all(tokenizer, [question.text for question in questions])
        rows = []
        for question, asked in zip(questions, coded, strict=True):
            row = Row([], [], [], [])
            row.add(asked, routes=True)
            row.add([pieces.symbols["<|ids|>"]])
            first = list(question.rounds[0]) if question.rounds else []
            row.add(pieces.named(first) if first else [pieces.symbols["<|answer|>"]], labelled=True)
            row.positives = first
            rows.append(row)
        return rows

    def second_rows(self, tokenizer: Any, corpus: Any, pieces: Pieces, draw: random.Random, count: int) -> list[Row]:
        """Up to the second round: question and the texts of the first, then the ids that these lead to, if any."""
        questions = corpus.questions(count // 2, "two_hop", seed=draw.randrange(1 << 30))
        questions += self.questions(corpus, draw, count - len(questions))
        coded = encode_all(tokenizer, [question.text for question in questions])
        rows = []
        for question, asked in zip(questions, coded, strict=True):
            row = Row([], [], [], [])
            row.add(asked, routes=True)
            row.add([pieces.symbols["<|ids|>"]])
            first = list(question.rounds[0]) if question.rounds else []
            chosen = first + self.distractors(question, draw, draw.randint(0 if first else 1, 3))
            draw.shuffle(chosen)
            row.add(pieces.named(chosen))
            row.add(pieces.block(chosen), routes=True)
            second = list(question.rounds[1]) if len(question.rounds) > 1 else []
            row.add(pieces.named(second) if second else [pieces.symbols["<|answer|>"]], labelled=True)
            row.positives = second or first
            rows.append(row)
        draw.shuffle(rows)
        return rows

    def collate(self, rows: list[Row], symbols: dict[str, int]) -> dict[str, Any]:
        width = self.width if self.kind == "dense" else max(len(row.ids) for row in rows)
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


def loader(arguments: Any, kind: str, rows: int, documents: int, width: int, seed: int) -> Iterator[dict[str, Any]]:
    data = Batches(str(arguments.tokenizer), kind, rows, documents, width, seed)
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
    """A learning rate over the time that a run may take: a short rise, then a cosine to a tenth."""

    def __init__(self, minutes: float, warmup: float = 0.03) -> None:
        self.start, self.seconds, self.warmup = time.time(), minutes * 60, warmup

    @property
    def progress(self) -> float:
        return (time.time() - self.start) / self.seconds

    def rate(self, peak: float) -> float:
        if self.progress < self.warmup:
            return peak * max(self.progress / self.warmup, 0.01)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(self.progress, 1.0))))


# Dense ----------------------------------------------------------------------------------------------------------------


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
    data = loader(arguments, "dense", arguments.rows, arguments.documents, arguments.width, arguments.seed)
    curve, clock, step, tokens = [], Clock(arguments.minutes), 0, 0
    waited = 0.0
    while clock.progress < 1:
        before = time.time()
        batch = to_device(next(data), arguments.device)
        waited += time.time() - before
        rows = min(len(batch["input_ids"]), arguments.keep)
        ids, labels = batch["input_ids"][:rows], batch["labels"][:rows]
        real = batch["attention_mask"][:rows, 1:].bool()
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
        step, tokens = step + 1, tokens + ids.numel()
        if step % arguments.every == 0:
            seconds = time.time() - clock.start
            row = {"step": step, "seconds": seconds, "answer": answer.item(), "text": text.item(), "norm": norm.item()}
            row |= {"tokens_per_s": tokens / seconds, "waited": waited / seconds}
            curve.append(row)
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out, max_shard_size="14MB")
    tokenizer.save_pretrained(arguments.out)
    TINY.save_pretrained(arguments.out)
    Path(arguments.out, "dense_curve.json").write_text(json.dumps(curve))


# Memory ---------------------------------------------------------------------------------------------------------------


def compile_parts(model: Any) -> None:
    """Compile what is elementwise: at this width norms, rotations and activations cost more than the products."""
    for module in model.modules():
        if isinstance(module, modeling_qwen3.Qwen3RMSNorm | modeling_qwen3.Qwen3MLP):
            module.compile(dynamic=True)
    modeling_qwen3.apply_rotary_pos_emb = torch.compile(modeling_qwen3.apply_rotary_pos_emb, dynamic=True)


def train_memory(arguments: Any) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if AutoConfig.from_pretrained(arguments.base).model_type == "msa":  # goes on where an earlier run stopped
        model = MSAForCausalLM.from_pretrained(arguments.base, **options)
    else:
        model = MSAForCausalLM.from_base(arguments.base, score_bias=True, chunk_size=64, top_k=16, **options)
    model.to(arguments.device)
    model.train()
    if arguments.compile:
        compile_parts(model)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    others = [p for name, p in model.named_parameters() if "router" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": others, "peak": arguments.rate}, {"params": routers, "peak": arguments.router_rate}],
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=arguments.device == "cuda",
    )
    data = loader(arguments, "memory", arguments.rows, arguments.documents, arguments.width, arguments.seed + 1)
    curve, clock, step = [], Clock(arguments.minutes), 0
    last: dict[str, Any] = {}
    while clock.progress < 1:
        batch = to_device(next(data), arguments.device)
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(group["peak"])
        warm = clock.progress < arguments.warmup
        model.config.lm_loss_weight, model.config.aux_loss_weight = (0.1, 1.0) if warm else (1.0, 0.1)
        kind = batch.pop("kind")
        with torch.autocast(arguments.device, torch.bfloat16):
            output = model(**batch)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        last[kind], last[f"aux_{kind}"] = output.lm_loss, output.aux_loss
        if step % arguments.every == 0:
            first = batch["positive_docs"][:, :1]
            there = first[:, 0] >= 0
            hits = {
                f"hit{layer}": (found.documents == first).any(1)[there].float().mean().item()
                for layer, found in output.routing.items()
            }
            row = {"step": step, "seconds": time.time() - clock.start}
            row |= {name: value.item() for name, value in last.items()} | hits
            curve.append(row)
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    model.eval().to(torch.bfloat16)
    model.config.lm_loss_weight, model.config.aux_loss_weight = 1.0, 0.1
    model.save_pretrained(arguments.out, max_shard_size="14MB")
    tokenizer.save_pretrained(arguments.out)
    TINY.save_pretrained(arguments.out)
    Path(arguments.out, "memory_curve.json").write_text(json.dumps(curve))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("tokenizer", help="train the tokenizer")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--documents", type=int, default=20_000)
    for name, minutes in (("dense", 9.0), ("memory", 9.0)):
        command = commands.add_parser(name)
        command.add_argument("--out", required=True)
        command.add_argument("--minutes", type=float, default=minutes)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=14)
        command.add_argument("--width", type=int, default=768)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--every", type=int, default=20)
        command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    dense, memory = (commands.choices[name] for name in ("dense", "memory"))
    dense.add_argument("--tokenizer", required=True)
    dense.add_argument("--rows", type=int, default=144)
    dense.add_argument("--keep", type=int, default=128, help="rows that a step takes, so that shapes stay the same")
    dense.add_argument("--documents", type=int, default=512)
    dense.add_argument("--rate", type=float, default=1.5e-3)
    memory.add_argument("--base", required=True)
    memory.add_argument("--rows", type=int, default=96)
    memory.add_argument("--documents", type=int, default=1024)
    memory.add_argument("--rate", type=float, default=5e-4)
    memory.add_argument("--router-rate", type=float, default=1e-3)
    memory.add_argument("--warmup", type=float, default=0.15, help="share of the time with the routers first")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.command == "tokenizer":
        train_tokenizer(arguments.out, arguments.documents)
    elif arguments.command == "dense":
        train_dense(arguments)
    else:
        arguments.tokenizer = arguments.base
        train_memory(arguments)


if __name__ == "__main__":
    main()
