"""A model whose code an older release wrote into its checkpoint is refused where it does not fit, with the remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import bank_of, byte_tokenizer, memory_model

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import BankStore, place_bank
from msa_hf.generation import COMPACT, MemoryInterleave
from msa_hf.retrieval import Searcher

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, bank, path: MemoryInterleave(model, TOKENIZER, bank, COMPACT),
        lambda model, bank, path: MemoryBank.from_pretrained(path, model),
        lambda model, bank, path: BankStore(directory=path, model=model),
        lambda model, bank, path: BankStore(directory=None, model=model),
        lambda model, bank, path: place_bank(path, model=model, tokenizer=TOKENIZER),
        lambda model, bank, path: place_bank(bank, model=model),
        lambda model, bank, path: Searcher(bank, model=model, tokenizer=TOKENIZER),
    ],
    ids=["ask", "load", "change", "change in memory", "place", "place a bank", "search"],
)
def test_code_of_another_release_is_refused(
    use: Callable[[MSAForCausalLM, MemoryBank, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = memory_model(TOKENIZER, COMPACT)
    bank = bank_of(model, TOKENIZER, COMPACT)
    bank.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "memory_interface", 1, raising=False)
    with pytest.raises(ValueError, match=r"another release of msa-hf.*msa-hf refresh"):
        use(model, bank, tmp_path)
