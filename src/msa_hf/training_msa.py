"""The training forward (paper, 3.4): packed rows, or a pool of documents shared by the questions of a batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention_msa import AttendingPass, EncodingPass, PrefixPass, chunks_of
from .inference_msa import MemoryMixin
from .losses_msa import auxiliary_loss, positive_mask
from .outputs_msa import MSACausalLMOutput
from .packing_msa import PackedRows, pooled_documents, unpack_rows
from .retrofit_msa import attention_layers
from .routing_msa import LayerRouting

TRAINING_ARGUMENTS = ("doc_ids", "documents", "positive_docs", "answer_labels")


class TrainingMixin(MemoryMixin):
    """The training forward of a causal LM; both forms share one mathematics, stages 1 and 2 with gradients."""

    def training_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        doc_ids: Tensor | None = None,
        documents: Any = None,
        positive_docs: Tensor | None = None,
        answer_labels: Tensor | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if doc_ids is not None and documents is not None:
            raise ValueError("Pass packed rows (`doc_ids`) or a pool (`documents`), not both.")
        if kwargs.pop("memory", None) is not None:
            raise ValueError("A training step brings its own documents; leave `memory` out.")
        if kwargs.pop("past_key_values", None) is not None or kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("A training step takes `input_ids` and no cache.")
        kwargs.pop("use_cache", None)
        kwargs.pop("output_document_scores", None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        if doc_ids is not None:
            rows = unpack_rows(doc_ids, mask)
            output, scores = self._packed_forward(rows, input_ids, doc_ids, position_ids, force_documents, kwargs)
        else:
            output, scores = self._pool_forward(
                input_ids, mask, position_ids, labels, documents, routing_mask, force_documents, kwargs
            )
        if torch.is_grad_enabled() and not self.config.shared_router and self._router_gradient_lost(scores):
            raise RuntimeError(
                "The routers' scores carry no gradient: gradient checkpointing runs with use_reentrant=True. "
                "Enable it with use_reentrant=False (the default of transformers)."
            )
        loss_kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        vocabulary = {"vocab_size": self.config.vocab_size, **loss_kwargs}
        terms: list[Tensor] = []
        if labels is not None:
            output.lm_loss = cast(Any, self).loss_function(output.logits, labels, **vocabulary)
            terms.append(self.config.lm_loss_weight * output.lm_loss)
        if answer_labels is not None:
            output.answer_loss = cast(Any, self).loss_function(output.logits, answer_labels, **vocabulary)
            terms.append(self.config.answer_loss_weight * output.answer_loss)
        if positive_docs is not None:
            some = next(iter(scores.values()))
            positives = positive_mask(positive_docs.to(some.device), some.shape[1])
            output.aux_loss = auxiliary_loss(scores, positives, self.config, labels, num_items_in_batch)
            terms.append(self.config.aux_loss_weight * output.aux_loss)
        if terms:
            output.loss = torch.stack([term.to(output.logits.device) for term in terms]).sum()
        return output if return_dict is not False else output.to_tuple()

    def _router_gradient_lost(self, scores: dict[int, Tensor]) -> bool:
        routers = [
            parameter.requires_grad
            for module in attention_layers(cast(nn.Module, self)).values()
            if hasattr(module, "router_q_proj")
            for parameter in module.router_q_proj.parameters()
        ]
        return any(routers) and not any(item.requires_grad for item in scores.values())

    def _encode_for_training(self, ids: Tensor, lengths: Tensor, **kwargs: Any) -> tuple[EncodingPass, Any]:
        """Encode right-padded documents [N, L], with gradients and through all layers."""
        similarity = self.config.training_similarity or self.config.similarity
        encoding = EncodingPass(self.config, lengths, similarity, stop=False)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        kwargs.setdefault("position_ids", positions)
        output = self.run_base(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, memory_pass=encoding, **kwargs
        )
        return encoding, output

    def _attend_in_training(
        self, encoding: EncodingPass, lengths: Tensor, prefix: dict[int, tuple[Tensor, Tensor]], **fields: Any
    ) -> AttendingPass:
        return AttendingPass(
            config=self.config,
            similarity=encoding.similarity,
            layers=dict(encoding.layers),
            offsets=chunks_of(lengths, self.config.chunk_size),
            prefix=prefix,
            keep_document_scores=True,
            **fields,
        )

    def _pool_forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        position_ids: Tensor | None,
        labels: Tensor | None,
        documents: Any,
        routing_mask: Tensor | None,
        force_documents: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[MSACausalLMOutput, dict[int, Tensor]]:
        if not bool(mask.any(1).all()):
            raise ValueError(f"Question {int((~mask.any(1)).nonzero()[0])} of the batch is only padding; leave it out.")
        ids, lengths = pooled_documents(documents, input_ids.device)
        if force_documents is not None:
            force_documents = self.checked_documents(force_documents, input_ids.shape[0], len(lengths))
        if routing_mask is None:
            routing_mask = mask if labels is None else mask & ((labels != -100).long().cumsum(1) == 0)
        encoding, _ = self._encode_for_training(ids, lengths, backbone_only=True)
        attending = self._attend_in_training(
            encoding,
            lengths,
            self.encode_prefix(),
            routing_mask=routing_mask.bool() & mask,
            force_documents=force_documents,
        )
        if position_ids is None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0) + self.config.first_position
        output = self.run_base(
            input_ids=input_ids,
            attention_mask=mask.long(),
            position_ids=position_ids,
            use_cache=False,
            memory_pass=attending,
            return_dict=True,
            **kwargs,
        )
        result = MSACausalLMOutput(
            logits=output.logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            routing=attending.routing,
        )
        return result, _scores_of(attending.routing)

    def _packed_forward(
        self,
        rows: PackedRows,
        input_ids: Tensor,
        doc_ids: Tensor,
        position_ids: Tensor | None,
        force_documents: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[MSACausalLMOutput, dict[int, Tensor]]:
        """The pool's computation on sequences cut out of rows, put together again."""
        batch, width = input_ids.shape
        first = rows.prefix.mask.shape[1] + self.config.top_k
        pieces: list[tuple[Any, Any]] = []

        def run(blocks: Any, start: int, memory_pass: Any) -> None:
            length = blocks.mask.shape[1]
            positions = torch.arange(start, start + length, device=input_ids.device).expand(blocks.mask.shape)
            if position_ids is not None:
                positions = torch.where(blocks.mask, blocks.take(position_ids), positions)
            output = self.run_base(
                input_ids=blocks.take(input_ids),
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=False,
                memory_pass=memory_pass,
                return_dict=True,
                **kwargs,
            )
            pieces.append((blocks, output))

        prefix_pass = PrefixPass()
        if rows.prefix.mask.shape[1]:
            run(rows.prefix, 0, prefix_pass)
        if not len(rows.document_row):
            raise ValueError("A packed batch needs at least one document (`doc_ids` of 1 and more).")
        lengths = rows.documents.mask.sum(1)
        similarity = self.config.training_similarity or self.config.similarity
        encoding = EncodingPass(self.config, lengths, similarity, stop=False)
        run(rows.documents, 0, encoding)

        # Where row b's document i lies among the documents of all rows: [B, n], -1 for none.
        count = int(rows.document_number.max()) + 1
        place = torch.full((batch, count), -1, device=input_ids.device)
        place[rows.document_row, rows.document_number] = torch.arange(len(lengths), device=input_ids.device)
        visible = rows.document_row == torch.arange(batch, device=input_ids.device)[:, None]
        routing: dict[int, LayerRouting] = {}
        if rows.active.mask.any():
            if force_documents is not None:
                force_documents = self.checked_documents(force_documents, batch, count)
                forced = place.gather(1, force_documents.clamp(min=0))
                force_documents = forced.masked_fill(force_documents < 0, -1)
            attending = self._attend_in_training(
                encoding,
                lengths,
                prefix_pass.states,
                routing_mask=rows.active.take(doc_ids, fill=-1) == 0,
                visible=visible,
                force_documents=force_documents,
            )
            run(rows.active, first, attending)
            number = torch.cat([rows.document_number, rows.document_number.new_full((1,), -1)])
            for layer, found in attending.routing.items():
                assert found.document_scores is not None
                scores = found.document_scores.gather(1, place.clamp(min=0)).masked_fill(place < 0, float("-inf"))
                routing[layer] = LayerRouting(number[found.documents], found.scores, scores)

        def assemble(part_of: Any) -> Tensor:
            states = part_of(pieces[0][1])
            whole = states.new_zeros(batch * width, states.shape[-1])
            for blocks, output in pieces:
                whole = blocks.put(whole, part_of(output))
            return whole.view(batch, width, -1)

        hidden_states = None
        if pieces[0][1].get("hidden_states") is not None:
            layers = range(len(pieces[0][1].hidden_states))
            hidden_states = tuple(assemble(lambda output, layer=layer: output.hidden_states[layer]) for layer in layers)
        result = MSACausalLMOutput(
            logits=assemble(lambda output: output.logits), hidden_states=hidden_states, routing=routing
        )
        return result, _scores_of(routing)


def _scores_of(routing: dict[int, LayerRouting]) -> dict[int, Tensor]:
    return {layer: found.document_scores for layer, found in routing.items() if found.document_scores is not None}
