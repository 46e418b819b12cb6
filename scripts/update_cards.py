"""Bring the code that every checkpoint under model_cards/ carries up to that of the package.

python scripts/update_cards.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from msa_hf import checkpoint_msa

SOURCE = Path(checkpoint_msa.__file__).parent
CARDS = Path(__file__).parents[1] / "model_cards"


def main() -> None:
    for config in sorted(CARDS.glob("*/config.json")):
        for name in checkpoint_msa.REMOTE_FILES:
            shutil.copyfile(SOURCE / name, config.parent / name)
        print(f"{config.parent}: {len(checkpoint_msa.REMOTE_FILES)} files")


if __name__ == "__main__":
    main()
