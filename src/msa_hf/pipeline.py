"""`pipeline("memory-text-generation", model=..., tokenizer=..., memory=bank)`; importing this file registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .generation import PUBLISHED, Answer, MemoryInterleave, PromptProtocol
from .model.modeling_msa import MSAForCausalLM

TASK = "memory-text-generation"


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
        *args: Any,
        memory: Any = None,
        protocol: PromptProtocol = PUBLISHED,
        interleave: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if memory is None:
            raise ValueError(f"pipeline({TASK!r}) needs `memory`, a bank that model.encode_documents() made.")
        super().__init__(*args, **kwargs)
        self.asker = MemoryInterleave(self.model, self.tokenizer, memory, protocol, **(interleave or {}))

    def __call__(self, question: str | Sequence[str], batch_size: int | None = None, **generate_kwargs: Any) -> Any:
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

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise TypeError(f"pipeline({TASK!r}) got unexpected arguments {sorted(kwargs)}.")
        return {}, {}, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        return input_

    def _forward(self, input_tensors: Any, **kwargs: Any) -> Any:
        return self.asker.ask(input_tensors)

    def postprocess(self, model_outputs: Answer, **kwargs: Any) -> dict[str, Any]:
        sources = [{"key": source.key, "score": source.score} for source in model_outputs.documents]
        return {"answer": model_outputs.text, "sources": sources, "trace": model_outputs.trace}


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=MemoryTextGenerationPipeline, pt_model=MSAForCausalLM)
