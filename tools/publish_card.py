"""Make the repository of a checkpoint for the Hub: its directory under model_cards/, with the code that loads it.

    python tools/publish_card.py model_cards/msa-hf-tiny build/msa-hf-tiny

The code is that of the package at this moment. Git keeps it once, in src/msa_hf/model: with the package installed a
checkpoint is loaded by the package's own classes and needs no copy. An adapter is loaded by PEFT and gets none.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from msa_hf.model.checkpoint_msa import copy_code


def publish(card: Path, out: Path) -> list[str]:
    """Copy a card's directory and write the code beside its weights; return the names of the code's files.

    Raises:
        ValueError: if `card` holds no checkpoint, or `out` is there and not an empty directory.
    """
    holds_model = (card / "config.json").is_file()
    if not holds_model and not (card / "adapter_config.json").is_file():
        raise ValueError(f"{card} holds neither a config.json nor an adapter_config.json: it is no checkpoint.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not an empty directory; remove it, or name another.")
    shutil.copytree(card, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return copy_code(out) if holds_model else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("card", type=Path, help="a directory under model_cards/")
    parser.add_argument("out", type=Path, help="the directory to make; it must not be there, or be empty")
    options = parser.parse_args(arguments)
    try:
        code = publish(options.card, options.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.out}: {sum(1 for _ in options.out.iterdir())} files, {len(code)} of them code")


if __name__ == "__main__":
    main()
