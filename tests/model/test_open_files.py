"""Files of tensors that cannot be opened: their errors have a number, so that they are told from damage."""

import errno
from pathlib import Path

import pytest
import torch
from bank_files import make_bank
from safetensors import SafetensorError
from safetensors.torch import save_file

from msa_hf.bank import BankStore, BankUnreadable
from msa_hf.model import open_files_msa
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.model.open_files_msa import TensorFile

# As safetensors, and torch that maps the file, say them.
ERRORS = [
    (RuntimeError("unable to open file </b/x> in read-only mode: Too many open files (24)"), errno.EMFILE),
    (RuntimeError("unable to mmap 288 bytes from file </b/x>: Permission denied (13)"), errno.EACCES),
    (MemoryError("Cannot allocate memory (os error 12)"), errno.ENOMEM),
    (OSError("Input/output error (os error 5)"), errno.EIO),
    (OSError(errno.EIO, "Input/output error"), errno.EIO),
]


@pytest.mark.parametrize(("error", "number"), ERRORS)
def test_an_error_of_the_system_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, number: int
) -> None:
    make_bank([4, 9], numbered=True).save_pretrained(tmp_path)

    def failing(*arguments: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(open_files_msa, "safe_open", failing)
        with pytest.raises(OSError) as raised:
            TensorFile(tmp_path / "x").open()
        assert raised.value.errno == number
        with pytest.raises(BankUnreadable, match="no damage"):
            MemoryBank.from_pretrained(tmp_path)
        for read_only in (True, False):
            with pytest.raises(BankUnreadable, match="no damage"):
                BankStore(None, tmp_path, read_only=read_only)
    assert len(MemoryBank.from_pretrained(tmp_path)) == 2


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        TensorFile(tmp_path / "missing").open()
    assert raised.value.errno == errno.ENOENT and "missing" in str(raised.value)
    (tmp_path / "damaged").write_bytes(b"\xff" * 20)
    with pytest.raises(SafetensorError):
        TensorFile(tmp_path / "damaged").open()
    save_file({"x": torch.ones(2)}, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(open_files_msa, "safe_open", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no device")))
        with pytest.raises(RuntimeError, match="no device"):
            TensorFile(tmp_path / "whole").open()
    assert TensorFile(tmp_path / "whole").open().get_tensor("x").tolist() == [1, 1]
