"""A teacher's embeddings do not depend on what else is embedded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from msa_hf.training.teacher import EmbeddingTeacher

WORDS = ["[PAD]", "[UNK]", "one", "two", "three", "four", "five"]


def test_embeddings_are_normalized_means_whatever_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)

    texts = ["one two three four five", "two", "three four", "five four three", "one two three four five one two"]
    found = EmbeddingTeacher(tmp_path, batch_tokens=6, max_length=6).embed(texts)
    together = EmbeddingTeacher(tmp_path, max_length=6).embed(texts)
    torch.testing.assert_close(found, together)
    with torch.no_grad():
        states = model(torch.tensor([[4, 5]])).last_hidden_state[0]
    torch.testing.assert_close(found[2], torch.nn.functional.normalize(states.mean(0), dim=0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
