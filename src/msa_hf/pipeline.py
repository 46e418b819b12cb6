"""`pipeline("memory-text-generation", model=..., tokenizer=..., memory=bank)`; importing this file registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .generation import PUBLISHED, Answer, MemoryInterleave, PromptProtocol, Trace
from .model.memory_msa import Memory, Snapshots
from .model.modeling_msa import MSAForCausalLM

TASK = "memory-text-generation"


class FoundSource(TypedDict):
    """A document that was read, and the routers' score of it."""

    key: str
    score: float | None


class MemoryAnswer(TypedDict):
    """An answer of the pipeline."""

    answer: str
    sources: list[FoundSource]
    trace: Trace


class MemoryTextGenerationPipeline(Pipeline):
    """Answers questions of a bank by Memory Interleave.

        answerer = pipeline("memory-text-generation", model=model, tokenizer=tokenizer, memory=bank)
        answerer(question="Who keeps the Oskel Lantern?")

    Args:
        memory: the bank that is asked.
        protocol: what the model was trained with.
        interleave: further arguments of `MemoryInterleave`.
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
        protocol: PromptProtocol = PUBLISHED,
        interleave: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        if memory is None:
            raise ValueError(f"pipeline({TASK!r}) needs `memory`, a bank that model.encode_documents() made.")
        super().__init__(*args, **kwargs)
        self.asker = MemoryInterleave(self.model, self.tokenizer, memory, protocol, **(interleave or {}))

    def __call__(
        self, question: str | Sequence[str], batch_size: int | None = None, **generate_kwargs: Any
    ) -> MemoryAnswer | list[MemoryAnswer]:
        """Answer a question, or many.

        Args:
            question: one text, or several.
            batch_size: questions at once (default: the pipeline's). The answers do not depend on it.
            generate_kwargs: options of `generate` for the answers.

        Returns:
            `answer`, a text; `sources`, the documents that were read, each with `key` and `score`; and `trace`. For
            several questions a list of them.
        """
        size = batch_size or self._batch_size or 1
        answers = self.asker.ask(question, batch_size=size, **generate_kwargs)
        return self.postprocess(answers) if isinstance(question, str) else [self.postprocess(item) for item in answers]

    def _sanitize_parameters(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
        if kwargs:
            raise TypeError(f"pipeline({TASK!r}) got unexpected arguments {sorted(kwargs)}.")
        return {}, {}, {}

    def preprocess(self, input_: str | Sequence[str], **kwargs: object) -> str | Sequence[str]:
        return input_

    def _forward(self, input_tensors: str | Sequence[str], **kwargs: object) -> Answer | list[Answer]:
        return self.asker.ask(input_tensors)

    def postprocess(self, model_outputs: Answer, **kwargs: object) -> MemoryAnswer:
        sources: list[FoundSource] = [{"key": source.key, "score": source.score} for source in model_outputs.documents]
        return {"answer": model_outputs.text, "sources": sources, "trace": model_outputs.trace}


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=MemoryTextGenerationPipeline, pt_model=MSAForCausalLM)
