"""Imports, for the server of children: what banks import on first use is there before the first fork."""

import logging
import tempfile
from pathlib import Path

import torch

from .check import contents
from .stub import open_bank

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)  # thousands of damaged banks are spoken of
with tempfile.TemporaryDirectory() as directory, open_bank(Path(directory)) as bank:
    for number in range(3):
        bank.upsert("key", f"text {number}", number)
    bank.add(["one", "two"])
    bank.delete("0")
    bank.compact()
    bank.verify()
    contents(bank.snapshot())
