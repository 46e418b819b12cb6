"""Adapters of PEFT in the place of a checkpoint: refused with the name of their base, and how both become one."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..user_errors import UserError

ADAPTER = "adapter_config.json"
# Types of PEFT that stand before a model's tokens: its weights cannot take them in.
LEARNED_PROMPTS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")


def is_adapter(directory: Path) -> bool:
    """Tell whether a directory has an adapter, and no checkpoint beside it."""
    return (directory / ADAPTER).is_file() and not (directory / "config.json").is_file()


def adapter_error(name: str, file: Path) -> UserError:
    """The error about an adapter that was given as a model.

    Args:
        name: as given: a directory, or a name on the Hub.
        file: its adapter_config.json.
    """
    config = _read(file)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    known = isinstance(base, str) and bool(base)
    of = f"of the base {base}" if known else f"whose base its {ADAPTER} does not name"
    if kind in LEARNED_PROMPTS:
        return UserError(
            f"{name}: a learned prompt of PEFT ({kind}), {of}, and no checkpoint; no weights can take it in, so that "
            'no command asks with it: load it in Python (docs/finetuning.md, "Loading an adapter")'
        )
    here = Path(name).is_dir()
    source = shlex.quote(name) if here else shlex.quote(name.rpartition("/")[2])
    fetch = "" if here else f"hf download {name} --local-dir {source} && "
    merge = f"python scripts/merge_adapter.py --base {shlex.quote(str(base)) if known else 'BASE'} --adapter {source}"
    return UserError(
        f"{name}: an adapter of PEFT, {of}, and no checkpoint; make one of both and give that: `{fetch}{merge} --out "
        'OUT` in a clone of the repository, or in Python (docs/finetuning.md, "Loading an adapter")'
    )


def _read(file: Path) -> dict[str, object]:
    """The fields of an adapter_config.json; none where nobody can read them, since it is refused in any case."""
    from ..model.bounds_msa import read_json  # imports torch, which names of what is not there need not wait for

    try:
        fields: object = read_json(file)
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
