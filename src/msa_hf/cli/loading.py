"""Things that commands are given by name: checkpoints, protocols, and directories to save to."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .adapters import ADAPTER, adapter_error, is_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..generation import PromptProtocol
    from ..model.modeling_msa import MSAForCausalLM

PROTOCOLS = ("compact", "published", "chat", "none")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MANIFEST = "manifest.json"  # as model/bank_format_msa.py says, which takes long to import
PROBE_SECONDS = 3.0  # to ask the Hub whether it has a model, before libraries ask again and again


def checkpoint(name: str) -> str:
    """A directory, or the id of a model that the Hub or its cache has; what is neither is refused at once."""
    path = Path(name)
    if not name:
        raise UserError("the name of the model is empty")
    if path.is_dir():
        if is_adapter(path):
            raise adapter_error(name, path / ADAPTER)
        return name
    if path.exists():
        raise UserError(f"{name}: not a directory")
    if path.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such directory")
    if problem := _missing_on_hub(name, "config.json", "model"):
        if (file := _adapter_on_hub(name)) is not None:
            raise adapter_error(name, file)
        raise UserError(f"{name}: no such directory (looked for {path.absolute()}), and {problem}")
    return name


def _adapter_on_hub(name: str) -> Path | None:
    """The adapter_config.json of a name on the Hub, from its cache where that has it; None where it is not to be had
    at once."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        if isinstance(cached := try_to_load_from_cache(name, ADAPTER), str):
            return Path(cached)
    except HFValidationError:
        return None
    try:
        if constants.HF_HUB_OFFLINE or _asked(name, ADAPTER, "model")[0] >= 400:
            return None  # what fails is fetched again and again for half a minute
    except Exception:  # of the one of several HTTP libraries that huggingface_hub uses
        return None
    try:
        return Path(hf_hub_download(name, ADAPTER, etag_timeout=PROBE_SECONDS))
    except (HTTPError, OSError):
        return None


def _asked(name: str, file: str, kind: str) -> tuple[int, str]:
    """The status with which the Hub replies when it is asked whether a model or dataset has a file, and the name of the
    error, "" for none; raises what its HTTP library does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    url = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}/resolve/main/{file}"
    reply = get_session().head(url, headers=build_hf_headers(), timeout=PROBE_SECONDS)
    return reply.status_code, reply.headers.get("X-Error-Code", "")


def _missing_on_hub(name: str, file: str, kind: str) -> str:
    """Why the Hub cannot give a model or dataset with this file; empty where it can, or says itself what it wants."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            return ""
    except HFValidationError:
        return f"that is no id of a {kind} on the Hub"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps the Hub from being asked"
    try:
        status, why = _asked(name, file, kind)
    except Exception as error:  # of the one of several HTTP libraries that huggingface_hub uses
        return f"the Hub cannot be reached ({constants.ENDPOINT}: {error})"
    if why == "EntryNotFound":
        return f"the {kind} of that name on the Hub has no {file} ({constants.ENDPOINT})"
    if status in (401, 404) and why != "GatedRepo":
        return f"the Hub has no such {kind} that you may read ({constants.ENDPOINT}: {status} {why})"
    return ""


def check_bank(name: str) -> None:
    """Make sure, before anything is loaded, that a bank's directory is there, or a bank of that name on the Hub."""
    path = Path(name)
    if not name:
        raise UserError("the name of the bank is empty")
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"{name}: not a directory, which a bank is")
    missing = _no_bank(name)
    if name.count("/") != 1 or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise UserError(missing)
    if problem := _missing_on_hub(name, MANIFEST, "dataset"):
        raise UserError(f"{missing}, and {problem}")


def _no_bank(name: str) -> str:
    return f"{name}: no bank: there is no such directory (looked for {Path(name).absolute()})"


def is_read_from_hub(name: str, read_only: bool) -> bool:
    """Tell whether a bank is one of the Hub's, which servers take for reading; makes sure that it is there.

    Raises:
        UserError: where it is not, or is to be written to.
    """
    from ..model.hub_msa import is_hub_name

    if not is_hub_name(name):
        return False
    if not read_only:
        raise UserError(
            f"{name}: no bank there (looked for {Path(name).absolute()}); give --create and ./{name} for an empty one, "
            "or --read-only for a bank of this name on the Hub"
        )
    check_bank(name)
    return True


def load(
    name: str, device: torch.device, dtype: str, protocol: str = "auto"
) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase]:
    """A model with a memory, and its tokenizer, which puts questions as `protocol` says."""
    name = checkpoint(name)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(f"{name}: no checkpoint there (no config.json)")
    from transformers import AutoTokenizer

    from ..model.modeling_msa import MSAForCausalLM

    with reported(foreign=True, subject=name):
        model = MSAForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    if note := slow_dtype(model):
        print(f"msa-hf: {note}", file=sys.stderr)
    if protocol == "none":
        tokenizer.chat_template = None
    if protocol == "chat" and not tokenizer.chat_template:
        raise UserError(f"--protocol chat: the tokenizer of {name} has no chat template")
    return model, tokenizer


def slow_dtype(model: MSAForCausalLM) -> str:
    """A remark on weights of 16 bits on a CPU that has no instructions for them, as before AVX-512; "" elsewhere."""
    import torch

    if model.device.type != "cpu" or model.dtype.itemsize != 2:
        return ""
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2"):
        return ""
    named = str(model.dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {named}; --dtype float32 is several times faster here"


def compile_runs(model: MSAForCausalLM) -> None:
    """Have all that the model generates compiled: questions with a memory go into caches whose shapes stay."""
    from ..model.compiled_msa import COMPILED_DEVICES

    if model.device.type not in COMPILED_DEVICES:
        raise UserError(
            f"--compile: makes accelerators faster, but the model computes on {model.device.type}; leave it out"
        )
    model.generation_config.cache_implementation = "static"


def protocol_of(choice: str, name: str) -> PromptProtocol | None:
    """The protocol that was asked for, or the checkpoint's own; None where documents are encoded as they are."""
    from ..generation import COMPACT, PUBLISHED, protocol_beside
    from ..model.hub_msa import BankUnavailable, is_hub_name

    if choice != "auto":
        return {"compact": COMPACT, "published": PUBLISHED, "chat": None, "none": None}[choice]
    if not is_hub_name(name):
        checkpoint(name)  # where there is no model, it is not its protocol that is unknown
    with reported():
        try:
            return protocol_beside(name)
        except BankUnavailable as error:
            raise UserError(f"{error} Or say how it is asked: --protocol {'|'.join(PROTOCOLS)}.") from error


def new_directory(name: str) -> Path:
    """A directory to save to."""
    path = Path(name)
    if not name:
        raise UserError("the name of the directory to save to is empty; the one that this is run in is named `.`")
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{name}: not a directory")
    return path


def bank_to_change(name: str) -> Path:
    """The directory of a bank that a command changes, and makes where there is none.

    A name such as `user/notes` may be meant for the bank of that name on the Hub: a new directory would hold other
    documents, and from then on would be taken for that bank by all commands. The Hub is not asked.

    Raises:
        UserError: where the name may be one on the Hub, in a folder that is not here or of a bank in the Hub's cache.
    """
    path = new_directory(name)
    if _may_be_on_hub(name) and (not path.parent.is_dir() or _is_bank_in_cache(name)):
        raise UserError(
            f"{name}: no such directory (looked for {path.absolute()}), and a new one would hide a bank of that name "
            f"on the Hub. Give ./{name} for a new bank. {_copied(name)}"
        )
    return path


def bank_here(name: str) -> Path:
    """The directory of a bank that a command changes, which has to be there already. The Hub is not asked.

    Raises:
        UserError: where it is not; where the name may be one on the Hub, with the way to change a copy.
    """
    path = Path(name)
    if not name:
        raise UserError("the name of the bank is empty")
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: not a directory, which a bank is")
    if _may_be_on_hub(name):
        raise UserError(f"{_no_bank(name)}; banks on the Hub are for reading. {_copied(name)}")
    raise UserError(_no_bank(name))


def _copied(name: str) -> str:
    copy = name.rpartition("/")[2]
    return (
        f"To change the Hub's, save a copy, MemoryBank.from_pretrained({name!r}).save_pretrained({copy!r}), and give "
        f"{copy}"
    )


def tell_hidden_bank(name: str) -> None:
    """Say on stderr that a new directory will be taken for a bank of that name, which the Hub's cache has."""
    if _may_be_on_hub(name) and _is_bank_in_cache(name):
        print(
            f"msa-hf: {name} is a new directory here, and no more the bank of that name on the Hub, for all commands "
            "that are run where this one is; another path keeps them apart",
            file=sys.stderr,
        )


def _may_be_on_hub(name: str) -> bool:
    from ..model.hub_msa import is_hub_name

    return is_hub_name(name)


def _is_bank_in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, MANIFEST, repo_type="dataset"), str)
