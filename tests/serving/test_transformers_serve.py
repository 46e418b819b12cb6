"""`transformers serve` refuses a checkpoint with a memory, as docs/serving.md says, and serves its base."""

from pathlib import Path

import pytest
import transformers
from scripted import COMPACT, byte_tokenizer, memory_model

manager = pytest.importorskip("transformers.cli.serving.model_manager", reason="this transformers has no such server")


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="an earlier server")
def test_it_serves_the_base_of_a_checkpoint_and_not_its_memory(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    model.save_pretrained(tmp_path / "memory")
    server = manager.ModelManager(device="cpu", trust_remote_code=True)
    with pytest.raises(AttributeError, match="no attribute MSAQwen3ForCausalLM"):
        server._load_model(str(tmp_path / "memory"))
    model.to_base().save_pretrained(tmp_path / "base")
    assert type(server._load_model(str(tmp_path / "base"))).__name__ == "Qwen3ForCausalLM"
