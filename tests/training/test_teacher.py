"""A teacher's embeddings do not depend on what else is embedded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from msa_hf.training.teacher import EmbeddingTeacher, load_teacher

WORDS = ["[PAD]", "[UNK]", "one", "two", "three", "four", "five"]


def save_teacher(directory: Path) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertModel(config).eval()
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    return model


def test_embeddings_are_normalized_means_whatever_the_batch(tmp_path: Path) -> None:
    model = save_teacher(tmp_path)

    texts = ["one two three four five", "two", "three four", "five four three", "one two three four five one two"]
    found = EmbeddingTeacher(tmp_path, batch_tokens=6, max_length=6).embed(texts)
    together = EmbeddingTeacher(tmp_path, max_length=6).embed(texts)
    torch.testing.assert_close(found, together)
    with torch.no_grad():
        states = model(torch.tensor([[4, 5]])).last_hidden_state[0]
    torch.testing.assert_close(found[2], torch.nn.functional.normalize(states.mean(0), dim=0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    assert EmbeddingTeacher(tmp_path).embed([]).shape == (0, 16)


def test_without_sentence_transformers_only_means_are_computed(tmp_path: Path, monkeypatch) -> None:
    """Any other pooling needs the library, which is said."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    save_teacher(tmp_path)
    with pytest.raises(ImportError, match=r"sentence-transformers: pip install msa-hf\[teacher\]"):
        load_teacher(str(tmp_path))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"1_{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    for mean in (True, False):
        pooling = {"pooling_mode_mean_tokens": mean, "pooling_mode_cls_token": not mean}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        if mean:
            assert isinstance(load_teacher(str(tmp_path)), EmbeddingTeacher)
        else:
            with pytest.raises(ImportError, match="sentence-transformers"):
                load_teacher(str(tmp_path))
