"""Tiny models with a real memory that say what a script tells them to."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.generation import COMPACT, PUBLISHED, PromptProtocol

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|object_ref_end|>", *COMPACT.special_tokens)
# Ids straddle these: "][", "[1" and "7][" hold the end of one id, or the beginning of another.
MERGES = (("]", "["), ("[", "1"), ("7", "]["), ("1", "2"), ("e", "r"))
WORDS = "amber birch cedar dune ember fjord grove heath inlet jetty knoll larch marsh north orchard pine quarry reef"
TEXTS = [f"The {word} stands {10 + place} miles from the {word[::-1]}." for place, word in enumerate(WORDS.split())]

Emission = str | Sequence[str]


def byte_tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """Bytes, a few merges that ignore the limits of ids, and the special tokens of both protocols."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *special])}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)):
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=list(special),
        padding_side="left",
    )


def memory_model(tokenizer: Any, protocol: PromptProtocol, family: str = "qwen3", **fields: Any) -> Any:
    """A tiny model with random weights large enough that what it sees matters."""
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **(windows if family == "gemma2" else {}),
    )
    base = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in sorted(base.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, 0.2, generator=generator)
    prefix = protocol.prefix_token_ids(tokenizer)
    fields = {"memory_layers": [1, 3], "chunk_size": 8, "top_k": 4, "prefix_token_ids": prefix, **fields}
    return MSAForCausalLM.from_base(base, **fields)


def bank_of(
    model: Any, tokenizer: Any, protocol: PromptProtocol, texts: Sequence[str] = TEXTS, **kwargs: Any
) -> MemoryBank:
    """`texts`, wrapped and encoded."""
    return model.encode_documents(protocol.encode_corpus(texts, tokenizer, **kwargs), tokenizer, show_progress=False)


class Script:
    """Overrides a model's logits, sample by sample, so that it says what it is told; all else is computed for real.

    A sample is recognized by its question, a stage by the rounds that its transcript holds. While a script is on, every
    forward is also checked against what was fed before: as many tokens as the attention mask shows.

    Args:
        model, tokenizer, protocol: as used.
        says: question -> what the model writes to name documents, per round; a text, or tokens. Rounds behind the last
            go on like it.
        answers: question -> the answer.

    Attributes:
        transcripts: every prefill's transcripts so far, in words; one list per prefill.
        fed: tokens of every forward, padding included.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        protocol: PromptProtocol,
        says: dict[str, Sequence[Emission]],
        answers: dict[str, Emission] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.protocol, self.says = model, tokenizer, protocol, says
        self.answers = answers or {}
        self.rows: list[list[int]] = []
        self.turns: list[int] = []
        self.transcripts: list[list[str]] = []
        self.fed: list[int] = []

    def __enter__(self) -> "Script":
        self.hook = self.model.register_forward_hook(self._override, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def tokens(self, emission: Emission) -> list[int]:
        if isinstance(emission, str):
            return self.tokenizer(emission, add_special_tokens=False)["input_ids"]
        return self.tokenizer.convert_tokens_to_ids(list(emission))

    def _override(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values") or output.past_key_values
        seen, length = cache.get_seq_length(), ids.shape[1]
        mask = kwargs.get("attention_mask")
        mask = torch.ones(len(ids), seen, dtype=torch.long) if mask is None else mask
        self.fed.append(length)
        if seen == length:
            self.rows, self.turns = [[] for _ in ids], [0] * len(ids)
        if len(self.rows) != len(ids):
            return  # beams
        for row, (new, real) in enumerate(zip(ids, mask[:, seen - length :], strict=True)):
            if length > 1:
                # What the model wrote to name documents is not part of the transcript: its canonical form comes now.
                self.rows[row] = self.rows[row][: self.turns[row]] + new[real.bool()].tolist()
                self.turns[row] = len(self.rows[row])
            else:
                self.rows[row].append(int(new))
        if length > 1:
            self.transcripts.append([self.tokenizer.decode(row) for row in self.rows])
        assert mask.sum(1).tolist() == [len(row) for row in self.rows]
        stop = self.tokens(self.protocol.retrieval_end)[0]
        for row, tokens in enumerate(self.rows):
            emission = self._emission(self.tokenizer.decode(tokens[: self.turns[row]]))
            if emission is not None:
                place = len(tokens) - self.turns[row]
                token = emission[place] if place < len(emission) else self.tokenizer.eos_token_id
                output.logits[row, -1, token] += 1e4
                if token != stop:  # or a selection that does not follow the script might end retrieval by chance
                    output.logits[row, -1, stop] -= 1e4

    def _emission(self, transcript: str) -> list[int] | None:
        question = next((item for item in self.says if item in transcript), None)
        if question is None:
            return None
        if self.protocol.retrieval_end in transcript:
            answer = self.answers.get(question)
            return None if answer is None else self.tokens(answer)
        ends = transcript.count(self.protocol.ids_end)
        number = ends // 2 if self.protocol.ids_end == self.protocol.block_end else ends
        rounds = self.says[question]
        return self.tokens(rounds[min(number, len(rounds) - 1)]) if rounds else None


__all__ = ["COMPACT", "PUBLISHED", "TEXTS", "Script", "bank_of", "byte_tokenizer", "memory_model"]
