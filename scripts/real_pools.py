"""The pools that `train_real.py` draws: labeled questions with near-misses, groups of passages with asked questions."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from real_data import sets_among
from real_model import encode_all, total_scores
from real_rows import Flat, load, log, rank, world
from real_words import WordRows, fitted_weights, word_scores
from torch import Tensor

from msa_hf.training.contrastive import TokenRows, route_rows
from msa_hf.training.mining import part_sizes
from msa_hf.training.sharing import gather_rows

LONGEST_QUESTION = 48
# Share of the labeled questions of a step.
SHARES = {
    "squad11": 0.26,
    "squadshifts_newwiki": 0.20,
    "nq": 0.16,
    "fairytaleqa": 0.16,
    "multihop": 0.06,
    "needles": 0.05,  # of real_needles.py
    "squadshifts_reddit": 0.08,
    "squadshifts_amazon": 0.08,
}
OTHERS = 0.1  # of each set of another name, beside these
# Every so-manieth labeled question of a set is not trained on: weights of hybrid retrieval are fitted on these. Search
# queries need others than questions do, and there are few of them.
HELD_OUT = {"nq": 4}
USUALLY = 20


def is_held_out(number: int, kind: str) -> bool:
    """Tell whether training leaves out a labeled question, by its number and the name of its set."""
    every = HELD_OUT.get(kind, USUALLY)
    return number % every == 7 % every


def shares_of(names: Iterable[str]) -> list[float]:
    """Shares of sets among the labeled questions of a step; they need not sum to 1."""
    return [SHARES.get(name, OTHERS) for name in names]


class Siblings:
    """Passages by article.

    Args:
        articles: [N] int64, the article of every passage, numbered from 0 without gaps.
    """

    def __init__(self, articles: Tensor) -> None:
        self.articles, self.order = articles, articles.argsort(stable=True)
        self.counts = torch.bincount(articles)
        self.first = self.counts.cumsum(0) - self.counts
        self.place_in_order = torch.empty_like(self.order)
        self.place_in_order[self.order] = torch.arange(len(self.order), device=self.order.device)

    def draw(self, places: Tensor) -> Tensor:
        """For every place another one of its article at random; itself where there is no other."""
        article = self.articles[places]
        count = self.counts[article]
        step = 1 + (torch.rand(len(places), device=places.device) * (count - 1)).long()
        step = torch.minimum(step, (count - 1).clamp(min=0))
        within = (self.place_in_order[places] - self.first[article] + step) % count
        return self.order[self.first[article] + within]


@dataclass
class Mined:
    """The router's own mistakes.

    Attributes:
        questions: [M] int64 numbers of asked questions. `gold`: [M] int64, their passages.
        wrong: [M, n] int64, the passages that the router finds best instead, -1 for none.
        labeled: [L, n] int64, the same for every labeled question by number; -1 where it was not asked.
    """

    questions: Tensor
    gold: Tensor
    wrong: Tensor
    labeled: Tensor


@dataclass
class Draw:
    """One process's part of a step's pool.

    Attributes:
        places: [N] int64, sorted, its passages. `numbers`: [Q] int64, its questions.
        rows, gold: [P] int64, pairs of a question's row and the place of a passage that answers it.
        share: [Q] float32, the teacher's.
    """

    places: Tensor
    numbers: Tensor
    rows: Tensor
    gold: Tensor
    share: Tensor

    def positives(self, places: Tensor) -> Tensor:
        """[Q, len(places)] bool, which of all processes' passages answer a question; a passage may be there twice."""
        found = torch.zeros(len(self.numbers), len(places), dtype=torch.bool, device=places.device)
        ordered, order = places.sort()
        first, stop = torch.searchsorted(ordered, self.gold), torch.searchsorted(ordered, self.gold, right=True)
        for further in range(int((stop - first).max())):
            there = first + further < stop
            found[self.rows[there], order[(first + further)[there]]] = True
        return found


class Words:
    """Words as a second teacher, beside the embedding model: what each says counts as labeled questions bear it out.

    Args:
        arguments: of the run.
        pools: whose questions and passages these are.
    """

    def __init__(self, arguments: argparse.Namespace, pools: Pools) -> None:
        work, where = Path(arguments.work), pools.where
        parts = [work / f"asked{shard}.words.pt" for shard in range(arguments.shards)]
        for path in (work / "words.pt", *parts):
            if not path.exists():
                raise SystemExit(f"{path} is missing: run real_lexical.py words and asked before, or give --no-words.")
        data = load(work / "words.pt")
        self.pools, self.near = pools, data["near"].long().to(where)
        self.passages = WordRows(**data["passages"]).to(where)
        asked = [WordRows(**load(path)) for path in parts]
        self.questions = WordRows.joined([WordRows(**data["train"]), *asked]).to(where)
        # Search queries, and questions as people write them: words are worth less for the first.
        texts = [item["question"] for item in load(work / "sets.pt")["train"]["questions"]]
        for shard in range(arguments.shards):
            texts += load(work / f"asked{shard}.pt")["texts"]
        self.kinds = torch.tensor([text.rstrip().endswith("?") for text in texts], device=where).long()
        self.weights = self._fit(arguments)
        log("teacher: cosine and words weigh", [[round(x, 3) for x in row] for row in self.weights.tolist()])

    def _fit(self, arguments: argparse.Namespace, count: int = 4000) -> Tensor:
        """[2, 2] float32, weights of cosines and of word scores, of search queries and of questions."""
        pools = self.pools
        known = sorted(number for numbers in pools.of_set.values() for number in numbers)
        known = random.Random(0).sample(known, min(count, len(known)))  # the same in all processes
        scores, gold, most = [], [], 6 + 2 * arguments.near
        for start in range(0, len(known), 64):
            numbers = torch.tensor(known[start : start + 64], device=pools.where)
            right = torch.full((len(numbers), 6), -1, device=pools.where)
            for row, number in enumerate(numbers.tolist()):
                wanted = pools.wanted[number][:6]
                right[row, : len(wanted)] = torch.tensor(wanted, device=pools.where)
            similar = pools.questions_near[numbers] @ pools.near.T
            similar[:, ~pools.allowed] = -1
            close = similar.topk(min(arguments.near, similar.shape[1]), dim=1).indices
            near = torch.cat([right, close, self._allowed(self.near[numbers][:, : arguments.near])], dim=1)
            places, column = torch.unique(near.clamp(min=0), return_inverse=True)
            both = torch.stack(
                [similar[:, places].float(), word_scores(self.questions, numbers, self.passages, places)], dim=2
            )
            found = both.gather(1, column[..., None].expand(-1, -1, 2))
            # Once each, and where it is gold, as gold.
            again = (near[:, :, None] == near[:, None, :]).tril(-1).any(2)
            found = found.masked_fill((again | (near < 0))[..., None], float("-inf"))
            is_gold = torch.zeros_like(near, dtype=torch.bool)
            is_gold[:, :6] = right >= 0
            pad = (0, most - near.shape[1])
            scores.append(torch.nn.functional.pad(found, (0, 0, *pad), value=float("-inf")))
            gold.append(torch.nn.functional.pad(is_gold, pad))
        kinds = self.kinds[torch.tensor(known, device=pools.where)]
        return fitted_weights(torch.cat(scores), torch.cat(gold), kinds)

    def _allowed(self, places: Tensor) -> Tensor:
        """Places, -1 for those that training does not see."""
        return places.masked_fill(~self.pools.allowed[places.clamp(min=0)], -1)

    def near_misses(self, labeled: Tensor, count: int) -> Tensor:
        """Passages that share a labeled question's words and do not answer it, `count` of each at most."""
        near = self.near[labeled]
        column = torch.randint(near.shape[1], (len(labeled), count), device=near.device)
        chosen = self._allowed(near.gather(1, column).flatten())
        return chosen[chosen >= 0]

    def logits(self, numbers: Tensor, places: Tensor, similar: Tensor) -> Tensor:
        """[Q, N] float32, by cosines [Q, N] and words together."""
        weights = self.weights[self.kinds[numbers]]
        shared = word_scores(self.questions, numbers, self.passages, places)
        return weights[:, :1] * similar + weights[:, 1:] * shared


class Pools:
    """Draws the pools of steps."""

    def __init__(self, arguments: argparse.Namespace, where: torch.device) -> None:
        self.arguments, self.where = arguments, where
        work = Path(arguments.work)
        data = load(work / "sets.pt")
        asked = [*(f"asked{shard}" for shard in range(arguments.shards)), *(["spans"] if arguments.spans else [])]
        shards = [load(work / f"{name}.pt") for name in asked]
        names = shards[0]["names"]
        loaded = [data, *(load(work / f"{name}.pt") for name in names)]
        self.passages = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
        firsts = np.cumsum([0, *(len(item["lengths"]) for item in loaded)])
        taught = load(work / "sets.teacher.pt")
        self.near = torch.cat([taught["passages"], *(load(work / f"{name}.teacher.pt") for name in names)]).to(where)
        # Questions: labeled ones first, then asked ones.
        train = data["train"]
        everything = [Flat(item["tokens"], item["lengths"]) for item in [train, *shards]]
        self.questions = Flat.joined(everything).to(where)
        asked_near = [load(work / f"{name}.teacher.pt") for name in asked]
        self.questions_near = torch.cat([taught["train"], *asked_near]).to(where)
        self.labeled = len(train["lengths"])
        # Behind the asked questions stand the queries that were cut out.
        self.cut_out = len(self.questions.lengths) - (len(shards[-1]["lengths"]) if arguments.spans else 0)
        self.wanted = [sorted({place for group in item["wanted"] for place in group}) for item in train["questions"]]
        short = (train["lengths"] <= LONGEST_QUESTION).tolist()
        of_set = {
            name: [
                n
                for n, item in enumerate(train["questions"])
                if item["set"] == name and short[n] and not is_held_out(n, name)
            ]
            for name in sets_among({item["set"] for item in train["questions"]}, SHARES)
        }
        self.of_set = {name: numbers for name, numbers in of_set.items() if numbers}
        starts = torch.from_numpy(firsts)[1:]
        self.place_of_asked = torch.cat([item["places"] + starts[item["sources"]] for item in shards]).to(where)
        self.allowed = torch.ones(len(self.passages.lengths), dtype=torch.bool, device=where)
        self.allowed[data["held_out"].to(where)] = False
        self._own_questions(arguments.drop)
        self.words: Words | None = None
        if arguments.words and arguments.spans:
            raise SystemExit("The words of queries cut out were not looked up: give --no-words with --spans.")
        if arguments.words:
            self.words = Words(arguments, self)
        self.siblings = Siblings(data["articles"].to(where))
        self.pick = random.Random(arguments.seed * 1000 + rank())
        self.mined: Mined | None = None
        self.minings = 0
        log(
            f"{len(self.asked)} asked questions about {len(self.owners)} passages; {self.labeled} labeled ones;",
            f"{len(self.passages.lengths)} passages in all",
        )

    def _own_questions(self, drop: float) -> None:
        """Passages with questions: asked[first[i] : first[i + 1]] are those of passage owners[i]."""
        places = self.place_of_asked
        # An asked question whose own passage the teacher finds far from it asks something else.
        fit = (self.questions_near[self.labeled :] * self.near[places]).sum(1).float()
        numbers = (fit > fit.kthvalue(max(int(drop * len(fit)), 1)).values).nonzero().squeeze(1)
        numbers = numbers[self.questions.lengths[self.labeled + numbers] <= LONGEST_QUESTION]
        order = places[numbers].argsort(stable=True)
        self.asked = numbers[order] + self.labeled
        self.owners, counts = torch.unique_consecutive(places[numbers][order], return_counts=True)
        self.first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.owners_near = self.near[self.owners]
        self.place_of_owner = torch.full((len(self.passages.lengths),), -1, device=self.where)
        self.place_of_owner[self.owners] = torch.arange(len(self.owners), device=self.where)

    def _one_of_each(self, owners: Tensor) -> Tensor:
        """A question of every passage `owners[i]`, at random."""
        first, stop = self.first[owners], self.first[owners + 1]
        number = first + (torch.rand(len(owners), device=self.where) * (stop - first)).long()
        return self.asked[torch.minimum(number, stop - 1)]

    def draw(self) -> Draw:
        arguments, where = self.arguments, self.where
        names = list(self.of_set)
        chosen = [
            self.pick.choice(self.of_set[name])
            for name in self.pick.choices(names, shares_of(names), k=arguments.labeled)
        ]
        chosen = list(dict.fromkeys(chosen))
        pairs = [(row, place) for row, number in enumerate(chosen) for place in self.wanted[number][:6]]
        labeled = torch.tensor(chosen, device=where)
        gold = torch.tensor(pairs, device=where)
        misses = self._near_misses(labeled, gold)
        # Others of the same article, which are what a passage is most easily taken for.
        others = self.siblings.draw(gold[:, 1].repeat(arguments.siblings))
        pool = torch.unique(torch.cat([gold[:, 1], misses, others[self.allowed[others]]]))
        # Groups of passages that are easily taken for each other.
        groups = max(max(arguments.pool - len(pool), 0) // arguments.group, 1)
        mined = None
        parts = [pool]
        if self.mined is not None:
            mined = torch.randint(len(self.mined.questions), (groups // 2,), device=where)
            wrong = self.mined.wrong[mined]
            order = torch.rand(wrong.shape, device=where).argsort(1)[:, : arguments.group - 1]
            wrong = wrong.gather(1, order).flatten()
            parts += [self.mined.gold[mined], wrong[wrong >= 0]]
            groups -= groups // 2
        by_words = 0 if self.words is None else groups // 2
        parts.append(self._neighbors(groups - by_words))
        if self.words is not None and by_words:
            parts.append(self._neighbors_by_words(self.words, by_words))
        pool = torch.unique(torch.cat(parts))
        owner = self.place_of_owner[pool]
        with_question = (owner >= 0).nonzero().squeeze(1)
        asked = self._one_of_each(owner[with_question])
        if mined is not None:
            # The question whose mistakes these are.
            row = torch.searchsorted(pool[with_question], self.mined.gold[mined])
            asked[row] = self.mined.questions[mined]
        numbers = torch.cat([labeled, asked])
        rows = torch.cat([gold[:, 0], len(labeled) + torch.arange(len(asked), device=where)])
        share = torch.full((len(numbers),), arguments.soft_asked, device=where)
        share[numbers >= self.cut_out] = arguments.soft_spans
        share[: len(labeled)] = arguments.soft_labeled
        return Draw(pool, numbers, rows, torch.cat([gold[:, 1], pool[with_question]]), share)

    def _near_misses(self, labeled: Tensor, gold: Tensor) -> Tensor:
        """Passages near to labeled questions: of the teacher's best, and the router's mistakes once there are any."""
        arguments, where = self.arguments, self.where
        scores = self.questions_near[labeled] @ self.near.T
        scores.masked_fill_(~self.allowed, -1)
        scores[gold[:, 0], gold[:, 1]] = -1
        best = scores.topk(min(arguments.near, scores.shape[1]), dim=1).indices
        column = torch.randint(best.shape[1], (len(labeled), arguments.misses), device=where)
        misses = best.gather(1, column).flatten()
        if self.words is not None:
            misses = torch.cat([misses, self.words.near_misses(labeled, arguments.misses)])
        if self.mined is None:
            return misses
        wrong = self.mined.labeled[labeled]
        column = torch.randint(wrong.shape[1], (len(labeled), arguments.misses), device=where)
        wrong = wrong.gather(1, column).flatten()
        return torch.cat([misses, wrong[wrong >= 0]])

    def _neighbors(self, groups: int) -> Tensor:
        """Groups of passages with questions that the teacher finds near to each other."""
        seeds = torch.randint(len(self.owners), (groups,), device=self.where)
        scores = self.owners_near[seeds] @ self.owners_near.T
        return self._groups(seeds, scores)

    def _neighbors_by_words(self, words: Words, groups: int) -> Tensor:
        """The same of passages that have the most of a question's words."""
        seeds = torch.randint(len(self.owners), (groups,), device=self.where)
        scores = word_scores(words.questions, self._one_of_each(seeds), words.passages, self.owners)
        return self._groups(seeds, scores)

    def _groups(self, seeds: Tensor, scores: Tensor) -> Tensor:
        """Places of the passages `owners[seeds]`, each with others among those that score highest beside it."""
        size = self.arguments.group
        around = scores.topk(min(3 * size, scores.shape[1]), dim=1).indices
        order = torch.rand(around.shape, device=self.where).argsort(1)[:, : size - 1]
        return self.owners[torch.cat([seeds[:, None], around.gather(1, order)], dim=1).flatten()]

    def asked_parts(self, numbers: Tensor, budget: int) -> Iterator[tuple[Tensor, TokenRows]]:
        """Questions by length in parts of at most `budget` padded tokens, each with its rows in `numbers`."""
        lengths, order = self.questions.lengths[numbers].sort(stable=True)
        for chosen in order.split(part_sizes(lengths.cpu().numpy(), budget)):
            yield chosen, self.questions.rows(numbers[chosen])

    def teacher_logits(self, numbers: Tensor, places: Tensor) -> Tensor:
        similar = (self.questions_near[numbers] @ self.near[places].T).float()
        if self.words is not None:
            return self.words.logits(numbers, places, similar)
        return similar / self.arguments.soft_temperature

    @torch.no_grad()
    def mine(self, model: Any, group: dist.ProcessGroup | None) -> None:
        """Ask the router, as it is, among all passages; what it finds before the gold ones is learned from next."""
        arguments = self.arguments
        self.minings += 1
        generator = torch.Generator().manual_seed(self.minings)  # the same passages in all processes
        among = torch.randperm(len(self.passages.lengths), generator=generator)
        among = among[: round(arguments.mine_share * len(among))].sort().values.to(self.where)
        among = among[self.allowed[among]]
        pool = encode_all(model, self.passages.at(among), arguments.mine_tokens, group)
        count = min(arguments.mined, len(self.owners))
        owners = torch.randperm(len(self.owners), generator=generator)[:count].sort().values
        owners = owners[rank() :: world()].to(self.where)
        questions, gold = self._one_of_each(owners), self.owners[owners]
        wrong = self._mistakes(model, pool, among, questions, gold[:, None])
        known = sorted(n for numbers in self.of_set.values() for n in numbers)
        known = random.Random(self.minings).sample(known, min(arguments.mined_labeled, len(known)))
        labeled = torch.tensor(known[rank() :: world()])
        most = max(len(self.wanted[number]) for number in labeled.tolist())
        right = torch.tensor([(self.wanted[n] * most)[:most] for n in labeled.tolist()], device=self.where)
        labeled = labeled.to(self.where)
        found = self._mistakes(model, pool, among, labeled, right)
        by_number = torch.full((self.labeled, found.shape[1]), -1, device=self.where)
        by_number[gather_rows(labeled, group)] = gather_rows(found, group)
        self.mined = Mined(
            gather_rows(questions, group), gather_rows(gold, group), gather_rows(wrong, group), by_number
        )

    def _mistakes(self, model: Any, pool: Any, among: Tensor, numbers: Tensor, gold: Tensor) -> Tensor:
        """[Q, n] the best passages that are not gold, -1 for those that the teacher finds better than the gold ones.

        Args:
            pool: what the memory layers hold of the passages `among` [N].
            numbers: [Q], questions. `gold`: [Q, m], places of their passages.
        """
        found = []
        lengths = self.passages.lengths[among]
        for some, right in zip(numbers.split(128), gold.split(128), strict=True):
            total = total_scores(route_rows(model, self.questions.rows(some), pool, lengths))
            best = total.topk(min(3 * self.arguments.group + right.shape[1], total.shape[1]), dim=1).indices
            best = among[best]
            places, column = torch.unique(torch.cat([right, best], dim=1), return_inverse=True)
            logits = self.teacher_logits(some, places).gather(1, column)
            limit = logits[:, : right.shape[1]].amax(1, keepdim=True) + self.arguments.mine_margin
            is_gold = (best[:, :, None] == right[:, None, :]).any(2)
            found.append(best.masked_fill(is_gold | (logits[:, right.shape[1] :] > limit), -1))
        return torch.cat(found)
