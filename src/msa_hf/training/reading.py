"""Rows in which a question is read together with texts, so that a model whose routers train goes on to answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.questions import IGNORED
from ..generation import PromptProtocol
from ..model.attention_msa import AttendingPass
from ..model.dense_layer_msa import DenseLayer, layers_over
from ..model.known_masks_msa import ones_like
from ..model.modeling_msa import MSAForCausalLM
from ..model.routing_msa import routing_request, scoring_of
from .collators import TranscriptCollator
from .contrastive import training_similarity

DIGITS = 6  # that the numbers of documents have in training rows at most


@dataclass(frozen=True)
class ReadingRow:
    """One transcript up to its answer: token ids, labels (`IGNORED` but for the answer), and which tokens route."""

    ids: list[int]
    labels: list[int]
    routes: list[bool]


def reading_row(
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol,
    question: str,
    texts: Sequence[str],
    answer: str,
    pick: random.Random,
) -> ReadingRow:
    """The transcript of a question that read `texts` in this order, under random ids, and its answer as labels."""
    # As in banks of any size: a reader that was shown long numbers alone takes short ones for a sign that nothing fits.
    size = max(10 ** pick.randint(1, DIGITS), 2 * len(texts))
    numbers = pick.sample(range(size), len(texts))
    rounds = [list(zip(numbers, texts, strict=True))] if texts else []
    segments = protocol.transcript(tokenizer, question, rounds, answer=answer)
    ids, labels, routes = TranscriptCollator._tokens(segments, len(rounds))
    written = len(segments[-1].input_ids)
    return ReadingRow(ids, [IGNORED] * (len(ids) - written) + labels[-written:], routes)


def reading_loss(
    model: MSAForCausalLM, ids: Tensor, labels: Tensor, routes: Tensor, pool: Mapping[int, DenseLayer], lengths: Tensor
) -> Tensor:
    """The language-model loss of answers, with a pool as the memory.

    Args:
        ids, labels, routes: [B, T] int64, int64 and bool, right-padded.
        pool: layer -> what the memory layers hold, of which no gradient is wanted.
        lengths: [N] int64, tokens of the pool's documents.

    Returns:
        Scalar float32, the mean over labeled tokens.
    """
    config = model.config
    attending = AttendingPass(
        config=config,
        layers=layers_over(pool, lengths, config.chunk_size),
        prefix={},
        request=routing_request(
            config, scoring_of(config, training_similarity(config)), routes, len(lengths), all_scores=True
        ),
    )
    positions = torch.arange(ids.shape[1], device=ids.device) + config.first_position
    output = model.run_base(
        backbone_only=True,
        input_ids=ids,
        attention_mask=ones_like(ids),
        position_ids=positions[None],
        use_cache=False,
        memory_pass=attending,
    )
    attending.finish()
    return _answer_loss(model, output.last_hidden_state, labels)


def plain_reading_loss(model: MSAForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """`reading_loss` without a memory: what a reader of the texts alone has to learn."""
    output = model.run_base(backbone_only=True, input_ids=ids, attention_mask=ones_like(ids), use_cache=False)
    return _answer_loss(model, output.last_hidden_state, labels)


@torch.no_grad()
def answer_losses(model: MSAForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Minus the log likelihood of every row's whole answer, without a memory.

    Args:
        ids, labels: [B, T] int64, right-padded.

    Returns:
        [B] float32, sums over labeled tokens.
    """
    output = model.run_base(backbone_only=True, input_ids=ids, attention_mask=ones_like(ids), use_cache=False)
    losses, wanted = _token_losses(model, output.last_hidden_state, labels)
    return losses.new_zeros(len(ids)).index_add_(0, wanted.nonzero()[:, 0], losses)


def _answer_loss(model: MSAForCausalLM, states: Tensor, labels: Tensor) -> Tensor:
    return _token_losses(model, states, labels)[0].mean()


def _token_losses(model: MSAForCausalLM, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of labeled tokens, float32, and where these stand, [B, T - 1] bool."""
    wanted = labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(states[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none"), wanted
