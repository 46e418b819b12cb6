"""The training forward (paper, 3.4): packed rows, or a pool of documents shared by the questions of a batch.

One step's losses, and nothing that a checkpoint cannot carry; what people train with is the package `training`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .attention_msa import AttendingPass, EncodingPass, PrefixPass, RecordingPass
from .compat_msa import CACHE, rename_cache
from .dense_layer_msa import DenseLayer, layers_over
from .inference_msa import MemoryMixin
from .losses_msa import auxiliary_loss, positive_mask
from .outputs_msa import MSACausalLMOutput
from .packing_msa import PackedRows, Pool, PooledDocuments, TokenBlocks, pool_documents, right_padded, unpack_rows
from .positions_msa import position_limit
from .routing_msa import LayerRouting, routing_request, scoring_of
from .samples_msa import Offsets, sequences_of
from .types_msa import Arguments
from .wrapping_msa import is_sharded

# None but `labels` may have "label" in its name: Trainer evaluates a loss only where all arguments named so are given.
TRAINING_ARGUMENTS = ("doc_ids", "documents", "positive_docs", "answer_mask")


Record = TypeVar("Record")  # what a pass keeps of a layer


class DifferentiableEncodingPass(EncodingPass):
    """Encodes documents for a loss, and refuses to where what it keeps would carry no gradient."""

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        if self.recording and not torch.is_grad_enabled():
            raise RuntimeError(
                "The documents of this training step would get no gradient: gradient checkpointing runs with "
                "use_reentrant=True. Enable it with use_reentrant=False (the default of transformers)."
            )
        super().enter(module, hidden_states)


class TrainingMixin(MemoryMixin):
    """The training forward of a causal LM; both forms share one mathematics, stages 1 and 2 with gradients."""

    def training_forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        doc_ids: Tensor | None = None,
        documents: Pool | None = None,
        positive_docs: Tensor | None = None,
        answer_mask: Tensor | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MSACausalLMOutput | tuple[object, ...]:
        if doc_ids is not None and documents is not None:
            raise ValueError("Pass packed rows (`doc_ids`) or a pool (`documents`), not both.")
        cache = rename_cache(kwargs)
        kwargs.pop(CACHE, None)
        embeds: Tensor | None = kwargs.pop("inputs_embeds", None)
        tokens = input_ids if embeds is None else embeds
        if tokens is None or (embeds is not None and (input_ids is not None or doc_ids is not None)):
            raise ValueError("A training step takes `input_ids`, or on a pool `inputs_embeds` in their place.")
        if cache is not None and (doc_ids is not None or getattr(cache, "contexts", True)):
            raise ValueError(
                "A training step takes no cache, but on a pool an MSACache that holds a learned prefix alone."
            )
        marks = tokens if embeds is None else embeds[..., 0]  # [B, T], for what counts tokens
        if doc_ids is not None and kwargs.get("output_attentions"):
            raise ValueError(
                "`output_attentions`: packed rows are computed as several sequences, whose attention weights do not "
                "make up those of a row. Pass the documents as a pool (`documents`), or leave it out."
            )
        if doc_ids is not None and routing_mask is not None:
            raise ValueError("Packed rows say in `doc_ids` which tokens route (0); leave `routing_mask` out.")
        if kwargs.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            raise ValueError(
                "`output_router_logits` asks for a loss that balances experts; a training step with documents has none."
            )
        if num_items_in_batch is not None and labels is None:
            raise ValueError(
                "`num_items_in_batch` counts labels, but this training step has none: Trainer takes them away for "
                "`label_smoothing_factor` and `compute_loss_func`, and computes a loss that trains no router. Use "
                "msa_hf.training.MemoryTrainer, which puts either in the place of the language loss alone."
            )
        if answer_mask is not None and labels is None:
            raise ValueError("`answer_mask` says which of the `labels` count again, but there are none.")
        past = 0 if cache is None else cache.get_seq_length()
        attention_mask = attention_mask if attention_mask is None else attention_mask[:, past:]
        _refuse_other_shapes(
            marks,
            attention_mask=attention_mask,
            labels=labels,
            doc_ids=doc_ids,
            answer_mask=answer_mask,
            routing_mask=routing_mask,
        )
        for name in ("use_cache", "skip_logits"):  # the latter is Trainer's with liger kernels
            kwargs.pop(name, None)
        mask = (torch.ones_like(marks) if attention_mask is None else attention_mask).bool()
        if not bool(mask.any(1).all()):
            raise ValueError(f"Question {int((~mask.any(1)).nonzero()[0])} of the batch is only padding; leave it out.")
        if embeds is None:
            tokens = tokens.masked_fill(~mask, 0)  # padding may have no row in the embedding

        batch, limit = marks.shape[0], position_limit(self.config)
        if doc_ids is not None:
            rows = unpack_rows(doc_ids, mask, limit)
            present = rows.places >= 0
        else:
            assert documents is not None
            pool = pool_documents(documents, marks.device, limit)
            present = torch.ones(batch, len(pool.lengths), dtype=torch.bool, device=marks.device)
        positives = (
            None
            if positive_docs is None
            else positive_mask(torch.as_tensor(positive_docs, device=present.device), present)
        )
        if force_documents is not None:
            force_documents = self.checked_documents(force_documents, batch, present.shape[1]).to(present.device)
            _refuse_absent(force_documents, present)
        if doc_ids is not None:
            output = self._packed_forward(rows, tokens, doc_ids, position_ids, force_documents, kwargs)
        else:
            if routing_mask is None:
                routing_mask = _tokens_before_labels(mask, labels)
            if cache is not None:
                kwargs[CACHE] = cache
            output = self._pool_forward(pool, tokens, mask, past, position_ids, routing_mask, force_documents, kwargs)

        losses: dict[str, Tensor] = {}
        if labels is not None:
            losses["lm_loss"] = self._language_loss(output.logits, labels, num_items_in_batch)
        if positives is not None:
            scores = _scores_of(output.routing)
            losses["aux_loss"] = auxiliary_loss(scores, positives, self.config, labels, num_items_in_batch)
        if labels is not None and answer_mask is not None:
            answers = labels.masked_fill(~answer_mask.bool(), -100)
            losses["answer_loss"] = self._language_loss(output.logits, answers, num_items_in_batch)
        terms = [
            getattr(self.config, f"{name}_weight") * loss.to(output.logits.device) for name, loss in losses.items()
        ]
        loss = torch.stack(terms).sum() if terms else None
        result = MSACausalLMOutput(
            loss=loss,
            **output,
            lm_loss=losses.get("lm_loss"),
            aux_loss=losses.get("aux_loss"),
            answer_loss=losses.get("answer_loss"),
        )
        return result if return_dict is not False else result.to_tuple()

    def _language_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The base's loss; 0 where nothing is labeled."""
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return self.loss_function(
            logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=count.clamp(min=1)
        )

    def _run_pass(
        self, memory_pass: RecordingPass[Record], tokens: Tensor, positions: Tensor, **kwargs: Any
    ) -> tuple[ModelOutput, dict[int, Record]]:
        """One run of the base over token ids or embeddings: its output, and what the pass recorded."""
        kwargs["inputs_embeds" if tokens.is_floating_point() else "input_ids"] = tokens
        kwargs.setdefault("attention_mask", torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device))
        try:
            output = self.run_base(
                position_ids=positions,
                use_cache=False,
                memory_pass=memory_pass,
                return_dict=True,
                **kwargs,
            )
        finally:
            recorded = memory_pass.finish()
        if is_sharded(self):
            recorded = memory_pass.tied(recorded, output[0])
        return output, recorded

    def _encoding_pass(self, lengths: Tensor) -> EncodingPass:
        made = DifferentiableEncodingPass if torch.is_grad_enabled() else EncodingPass
        return made(self.config, lengths, self._training_similarity, stop=False)

    def _attending_pass(
        self,
        layers: dict[int, DenseLayer],
        lengths: Tensor,
        prefix: dict[int, tuple[Tensor, Tensor]],
        routing_mask: Tensor,
        force_documents: Tensor | None,
        visible: Tensor | None = None,
    ) -> AttendingPass:
        request = routing_request(
            self.config,
            scoring_of(self.config, self._training_similarity),
            routing_mask,
            len(lengths),
            documents=force_documents,
            all_scores=True,
        )
        layers = layers_over(layers, lengths, self.config.chunk_size, visible)
        return AttendingPass(config=self.config, layers=layers, prefix=prefix, request=request)

    @property
    def _training_similarity(self) -> str:
        return self.config.training_similarity or self.config.similarity

    def _pool_forward(
        self,
        pool: PooledDocuments,
        tokens: Tensor,
        mask: Tensor,
        past: int,
        position_ids: Tensor | None,
        routing_mask: Tensor,
        force_documents: Tensor | None,
        kwargs: Arguments,
    ) -> MSACausalLMOutput:
        positions = torch.arange(pool.ids.shape[1], device=pool.ids.device).expand(pool.ids.shape)
        # Padding stands behind the documents, where causal attention does not look.
        with sequences_of(self, len(pool.ids), owners=None):
            _, layers = self._run_pass(self._encoding_pass(pool.lengths), pool.ids, positions, backbone_only=True)
        with sequences_of(self, 1, owners=None):
            prefix = self.prefix_states(functools.partial(self.run_base, backbone_only=True))
        attending = self._attending_pass(
            layers,
            pool.lengths,
            prefix,
            routing_mask.bool() & mask,
            force_documents,
        )
        if position_ids is None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0) + past + self.config.first_position
        if past or not right_padded(mask):  # else as with the documents, and kernels need no mask
            kwargs["attention_mask"] = torch.nn.functional.pad(mask.long(), (past, 0), value=1)
        output, routing = self._run_pass(attending, tokens, position_ids, **kwargs)
        return MSACausalLMOutput(
            logits=output.logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            routing=routing,
        )

    def _packed_forward(
        self,
        rows: PackedRows,
        input_ids: Tensor,
        doc_ids: Tensor,
        position_ids: Tensor | None,
        force_documents: Tensor | None,
        kwargs: Arguments,
    ) -> MSACausalLMOutput:
        """The pool's computation on sequences cut out of rows, put together again."""
        batch, width = input_ids.shape
        pieces: list[tuple[TokenBlocks, ModelOutput]] = []

        def run(
            blocks: TokenBlocks,
            start: int,
            memory_pass: RecordingPass[Record],
            owners: Tensor,
            offsets: Offsets | None = None,
        ) -> dict[int, Record]:
            length = blocks.mask.shape[1]
            positions = torch.arange(start, start + length, device=input_ids.device).expand(blocks.mask.shape)
            if position_ids is not None:
                positions = torch.where(blocks.mask, blocks.take(position_ids.expand(input_ids.shape)), positions)
            with sequences_of(self, len(blocks.mask), owners, offsets):
                output, recorded = self._run_pass(memory_pass, blocks.take(input_ids), positions, **kwargs)
            pieces.append((blocks, output))
            return recorded

        samples = torch.arange(batch, device=input_ids.device)
        prefix = run(rows.prefix, 0, PrefixPass(), samples) if rows.prefix.mask.shape[1] else {}
        lengths = rows.documents.mask.sum(1)
        layers = run(rows.documents, 0, self._encoding_pass(lengths), rows.document_row)
        routing: dict[int, LayerRouting] = {}
        if rows.active.mask.any():
            places = rows.places
            if force_documents is not None:
                force_documents = places.gather(1, force_documents.clamp(min=0)).masked_fill(force_documents < 0, -1)
            attending = self._attending_pass(
                layers,
                lengths,
                prefix,
                rows.active.take(doc_ids, fill=-1) == 0,
                force_documents,
                visible=rows.document_row == samples[:, None],
            )
            start = rows.prefix.mask.shape[1] + self.config.top_k
            found = run(rows.active, start, attending, samples, functools.partial(_offsets_of, rows.active, width))
            # From documents of all rows to those of each row.
            number = torch.cat([rows.document_number, rows.document_number.new_full((1,), -1)])
            for layer, item in found.items():
                assert item.document_scores is not None
                scores = item.document_scores.gather(1, places.clamp(min=0)).masked_fill(places < 0, float("-inf"))
                routing[layer] = LayerRouting(number[item.documents], item.scores, scores)

        def assemble(parts: Sequence[Tensor]) -> Tensor:
            whole = parts[0].new_zeros(batch, width, parts[0].shape[-1])
            for (blocks, _), states in zip(pieces, parts, strict=True):
                whole = blocks.put(whole, states)
            return whole

        hidden_states = None
        if pieces[0][1].get("hidden_states") is not None:
            every_layer = zip(*(output.hidden_states for _, output in pieces), strict=True)
            hidden_states = tuple(map(assemble, every_layer))
        return MSACausalLMOutput(
            logits=assemble([output.logits for _, output in pieces]), hidden_states=hidden_states, routing=routing
        )


def _offsets_of(active: TokenBlocks, width: int, offsets: Sequence[int | None]) -> list[int | None]:
    """Tokens from the end of rows of `width` -> from the end of the blocks of their active tokens.

    None where there is none, or where it counts from a token of a document, which calls nothing.
    """
    found: list[int | None] = []
    for row, offset in enumerate(offsets):
        places = active.index[row][active.mask[row]] % width
        start = width - (offset or 0)
        called = offset is not None and bool((places == start).any())
        found.append(active.mask.shape[1] - int((places < start).sum()) if called else None)
    return found


def _refuse_other_shapes(input_ids: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != input_ids.shape:
            raise ValueError(f"`{name}` must be {list(input_ids.shape)} like `input_ids`, got {list(other.shape)}.")


def _refuse_absent(documents: Tensor, present: Tensor) -> None:
    absent = (documents >= 0) & ~present.gather(1, documents.clamp(min=0))
    if bool(absent.any()):
        sample, place = absent.nonzero()[0].tolist()
        raise ValueError(
            f"`force_documents` of sample {sample} names document {int(documents[sample, place])}, "
            "which its row does not hold; -1 stands for none."
        )


def _tokens_before_labels(mask: Tensor, labels: Tensor | None) -> Tensor:
    """[B, T] bool tokens that route by default.

    Raises:
        ValueError: where the labels leave a question without any.
    """
    if labels is None:
        return mask
    routing_mask = mask & ((labels != -100).long().cumsum(1) == 0)
    if not bool(routing_mask.any(1).all()):
        raise ValueError(
            f"Question {int((~routing_mask.any(1)).nonzero()[0])} of the batch has no token before its first label, so "
            "nothing of it routes. Set the labels of the question to -100, or say with `routing_mask` what routes."
        )
    return routing_mask


def _scores_of(routing: dict[int, LayerRouting] | None) -> dict[int, Tensor]:
    """Layer -> document scores [B, N].

    Raises:
        ValueError: where nothing was routed.
    """
    if not routing:
        raise ValueError("`positive_docs` need tokens that route, but no row has any outside its documents.")
    return {layer: item.document_scores for layer, item in routing.items() if item.document_scores is not None}
