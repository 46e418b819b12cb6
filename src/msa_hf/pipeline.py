"""`pipeline("memory-text-generation", model=..., tokenizer=..., memory=bank)`; importing this file registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .generation import Answer, PromptProtocol, Trace, asker_of, protocol_beside
from .generation.prompting import Said, asked_of
from .model.hub_msa import BankUnavailable
from .model.memory_msa import Memory, Snapshots
from .model.modeling_msa import MSAForCausalLM

TASK = "memory-text-generation"


class FoundSource(TypedDict):
    """A document that the answer comes from, the routers' score of it and its text, None where the bank has none."""

    key: str
    score: float | None
    text: str | None


class MemoryAnswer(TypedDict):
    """An answer of the pipeline."""

    answer: str
    sources: list[FoundSource]
    trace: Trace


class MemoryTextGenerationPipeline(Pipeline):
    """Answers questions of a bank as the checkpoint was made for: by Memory Interleave where it has a protocol.

        answerer = pipeline("memory-text-generation", model="my-msa", memory=bank)
        answerer("Who keeps the Oskel Lantern?")
        answerer([{"role": "user", "content": "Who keeps the Oskel Lantern?"}])

    Args:
        memory: the bank that is asked.
        protocol: what the model was trained with. Default: what lies beside its checkpoint. None, and where nothing
            does: questions are put by the tokenizer's chat template, else plainly, and answered in one run.
        interleave: further arguments of `MemoryInterleave`; without a protocol `max_new_tokens` alone.
        kwargs: what `Pipeline` takes.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        *args: object,
        memory: Memory | Snapshots | None = None,
        protocol: PromptProtocol | Literal["auto"] | None = "auto",
        interleave: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        if memory is None:
            raise ValueError(f"pipeline({TASK!r}) needs `memory`, a bank that model.encode_documents() made.")
        super().__init__(*args, **kwargs)
        if protocol == "auto":
            protocol = _protocol_of(str(self.model.name_or_path or ""))
        assert not isinstance(protocol, str)
        self.asker = asker_of(self.model, self.tokenizer, memory, protocol, **(interleave or {}))

    def __call__(
        self, question: Said | Sequence[Said], batch_size: int | None = None, **generate_kwargs: Any
    ) -> MemoryAnswer | list[MemoryAnswer]:
        """Answer a question, or many.

        Args:
            question: a text, or chat messages (mappings with `role` and `content`) that end with the user's question;
                or several of either.
            batch_size: questions at once (default: the pipeline's). The answers do not depend on it.
            generate_kwargs: options of `generate` for the answers.

        Returns:
            `answer`, a text; `sources`, the documents that were read, or attended to where nothing is read, each with
            `key`, `score` and `text`; and `trace`. For several questions a list of them.
        """
        size = batch_size or self._batch_size or 1
        asked, alone = asked_of(question)
        answers = self.asker.ask(asked, batch_size=size, **generate_kwargs)
        found = [self.postprocess(item) for item in answers]
        return found[0] if alone else found

    def _sanitize_parameters(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
        if kwargs:
            raise TypeError(f"pipeline({TASK!r}) got unexpected arguments {sorted(kwargs)}.")
        return {}, {}, {}

    def preprocess(self, input_: Said, **kwargs: object) -> Said:
        return input_

    def _forward(self, input_tensors: Said, **kwargs: object) -> Answer:
        return self.asker.ask(input_tensors)

    def postprocess(self, model_outputs: Answer, **kwargs: object) -> MemoryAnswer:
        documents = self.asker.bank.documents
        sources: list[FoundSource] = [
            {"key": source.key, "score": source.score, "text": documents[source.position].text}
            for source in model_outputs.documents
        ]
        return {"answer": model_outputs.text, "sources": sources, "trace": model_outputs.trace}


def _protocol_of(name: str) -> PromptProtocol | None:
    """The protocol beside the checkpoint that a model was loaded from; None where it has none, or was not loaded.

    Raises:
        BankUnavailable: where that cannot be found out, with the remedies.
    """
    try:
        return protocol_beside(name) if name else None
    except BankUnavailable as error:
        raise BankUnavailable(
            f"{error} Or pass `protocol`: PromptProtocol.from_pretrained() takes `token` and `revision`; None for a "
            "model without one."
        ) from error


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=MemoryTextGenerationPipeline, pt_model=MSAForCausalLM)
