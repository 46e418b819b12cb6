"""Banks by their names on the Hub: fetched into its cache, where they are opened like any other directory.

A bank is a dataset repository there: it holds documents, and may have the name of the model that made it.
"""

import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from .bank_format_msa import BACKUP, MANIFEST, BankError, file_names
from .bank_log_msa import entry_names
from .bank_manifest_msa import is_bank
from .bank_reader_msa import KnowsOrigin, open_bank

logger = logging.getLogger(__name__)
REPO_TYPE = "dataset"
LIBRARY = "msa_hf"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SECONDS = 10.0  # for the Hub's first answer
LOG_IN = "log in with `hf auth login`, or pass `token=`"
# What lies beside a bank's own files and is kept for searching; the card.
SIDE_FILES = ("fusion.json", "lexical.json", "lexical-*/*", "vectors.json", "vectors-*.safetensors", "README.md")


class BankUnavailable(BankError, OSError):
    """A bank cannot be fetched from the Hub, or sent there. The message names the cause and the remedy."""


def is_hub_name(name: object) -> bool:
    """Tell whether a text is to be looked for on the Hub: `user/bank`, where no such path exists here."""
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name) or os.path.lexists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def bank_directory(
    name: str | Path,
    model: KnowsOrigin | None = None,
    tokenizer: object = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The directory of a bank: the path itself, or for a name on the Hub where its files were put.

    Of a repository only a bank's files are fetched, and before any data the manifest, whose origin is compared.

    Args:
        name: a directory; a text `user/bank` that is no path here is a dataset on the Hub.
        model, tokenizer: as of `open_bank`, for a bank on the Hub.
        revision: a branch, tag or commit; only of a bank on the Hub. Default: its main branch.
        token: for what is private or gated. Default: that of `hf auth login`, or of the variable HF_TOKEN.
        cache_dir: default the Hub's own cache.
        local_files_only: ask the cache alone, as the variable HF_HUB_OFFLINE does.
        force_download: fetch files again that the cache has.

    Raises:
        BankUnavailable: where there is no such repository or revision, nobody may see it, or the Hub cannot be reached
            and the cache has no copy.
        BankFormatError: where the repository is no bank.
        ValueError: where another model made it; for a revision of a local directory.
    """
    if not is_hub_name(name):
        if revision is not None:
            raise ValueError(
                f"{str(name)!r} is a directory here or no name on the Hub, and `revision` is of a bank on the Hub: "
                "leave it out, or give the name as 'user/bank' where no such path exists."
            )
        return Path(name)
    repo_id = str(name)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    with hub_errors(f"the dataset {repo_id!r}", revision, local=repo_id):
        if not offline:
            offline = not _reachable(HfApi(token=token, library_name=LIBRARY), repo_id, revision)

        def fetch(wanted: str | None, patterns: list[str]) -> Path:
            found = snapshot_download(
                repo_id,
                repo_type=REPO_TYPE,
                revision=wanted,
                allow_patterns=patterns,
                token=token,
                cache_dir=cache_dir,
                library_name=LIBRARY,
                local_files_only=offline,
                force_download=force_download and not offline,
            )
            return Path(found)

        directory = fetch(revision, [MANIFEST, BACKUP, "commit-*.json", "README.md"])
        if not is_bank(directory):
            raise BankUnavailable(
                f"The dataset {repo_id!r} has no {MANIFEST}, so it is no bank. `bank.push_to_hub` makes one."
            )
        manifest = open_bank(directory, model, tokenizer).manifest
        names = sorted(file_names(manifest) | entry_names(manifest))
        return fetch(directory.name, [*map(glob.escape, names), *SIDE_FILES])


def _reachable(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Ask the Hub for a repository; False where the Hub itself does not answer, so that the cache is left."""
    try:
        api.repo_info(repo_id, repo_type=REPO_TYPE, revision=revision, timeout=SECONDS)
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        logger.warning("The Hub cannot be reached (%s): %s is looked for in the cache.", _short(error), repo_id)
        return False
    return True


def knock() -> None:
    """Wait for the first answer of the Hub, but not for long: what its client asks later may wait without a limit."""
    get_session().head(constants.ENDPOINT, timeout=SECONDS)


@contextmanager
def hub_errors(what: str, revision: str | None = None, local: str | None = None) -> Iterator[None]:
    """A block in which the Hub is asked, whose errors become a `BankUnavailable` that names the remedy.

    Args:
        what: that is asked for, as `"the dataset 'user/bank'"`.
        revision: of it.
        local: a path that was looked for first.
    """
    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError) as error:
        # `force_download` hides what the Hub said behind a ValueError.
        said = error.__cause__ if type(error) is ValueError else error
        if (message := _message(said, what, revision, local)) is None:
            raise
        raise BankUnavailable(message) from error


def _message(error: BaseException | None, what: str, revision: str | None, local: str | None) -> str | None:
    """The message about an error of the Hub's client; None for what is none."""
    here = "" if local is None else f"There is no directory {local!r} here, and "
    subject = what[0].upper() + what[1:]
    if isinstance(error, GatedRepoError):
        return f"Access to {what} is granted by its owner: ask for it on its page on the Hub, then {LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        missing = f"there is no {what.removeprefix('the ')} on the Hub that you may see"
        said = f"{here}{missing}" if here else missing[0].upper() + missing[1:]
        return f"{said}. Check the name; if it is private, {LOG_IN}."
    if isinstance(error, RevisionNotFoundError):
        return f"{subject} has no revision {revision!r}: give one of its branches, tags or commits."
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set; unset it for the first download"
        elif error.__cause__ is not None:
            cause = f"fetching it failed ({_short(error.__cause__)}); try again with a connection"
        else:
            cause = "the Hub was not asked, or could not be reached; load it once with a connection"
        at = "" if revision is None else f" at {revision!r}"
        missing = f"{here}the Hub's cache has no complete copy of {what}{at}"
        return f"{missing}: {cause}, or give a directory of this machine."
    if isinstance(error, OfflineModeIsEnabled):
        return f"{subject} needs the Hub, but HF_HUB_OFFLINE is set."
    if isinstance(error, HfHubHTTPError):
        status, remedy = error.response.status_code, "Try again later"
        if status in _REMEDIES:
            remedy = _REMEDIES[status]
        return f"The Hub answered {status} about {what} ({_short(error)}). {remedy}."
    if isinstance(error, HTTPError):
        return f"The Hub cannot be reached about {what} ({_short(error)}). Check the connection and HF_ENDPOINT."
    return None


_REMEDIES = {
    401: f"The token is missing or was refused: {LOG_IN}",
    403: "This login may not do that: see the rights of the token",
    412: "It was changed by somebody else meanwhile: do it again",
}


def _short(error: BaseException) -> str:
    """The first line of what an error says, with its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
