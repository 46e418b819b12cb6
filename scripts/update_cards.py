"""Bring the code that every checkpoint under model_cards/ carries up to that of the package.

python scripts/update_cards.py
"""

from __future__ import annotations

from pathlib import Path

from msa_hf.model.checkpoint_msa import copy_code

CARDS = Path(__file__).parents[1] / "model_cards"


def main() -> None:
    for config in sorted(CARDS.glob("*/config.json")):
        print(f"{config.parent}: {len(copy_code(config.parent))} files changed")


if __name__ == "__main__":
    main()
