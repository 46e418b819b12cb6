"""A file that may lie beside a checkpoint, in its directory or on the Hub: there, or known to be missing.

That nobody could find out is neither, and an error: what such a file says would be lost without a word.
"""

import logging
import os
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from .hub_msa import LIBRARY, SECONDS, BankUnavailable, hub_errors

logger = logging.getLogger(__name__)


def file_beside(
    name_or_path: str | Path,
    file: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path | None:
    """The path of a file beside a checkpoint, fetched into the Hub's cache where it lies there; None: it has none.

    Where the Hub is not asked, cannot be reached or refuses, what its cache knows of the revision counts: a copy of the
    file, or the note, made when the Hub was asked for it, that there is none.

    Args:
        name_or_path: a directory, or a name on the Hub.
        file: its name, with slashes.
        repo_type: `"model"` or `"dataset"`, on the Hub.
        revision: a branch, tag or commit on the Hub. Default: its main branch.
        token: for what is private or gated. Default: that of `hf auth login`, or of the variable HF_TOKEN.
        cache_dir: default the Hub's own cache.
        local_files_only: ask the cache alone, as the variable HF_HUB_OFFLINE does.
        force_download: fetch it again where the cache has it.
        subfolder: in which the checkpoint lies.

    Raises:
        BankUnavailable: where neither the Hub nor its cache says if there is such a file, or there is no such
            checkpoint.
    """
    inside = f"{subfolder}/{file}" if subfolder else file
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, inside)
        return path if path.is_file() else None
    name = str(name_or_path)
    unknown = f"It is not known if {name!r} has a {file}."
    try:
        with hub_errors(f"the {repo_type} {name!r}", revision, local=name):
            return _asked(name, inside, repo_type, revision, token, cache_dir, local_files_only, force_download)
    except HFValidationError as error:
        raise BankUnavailable(
            f"{unknown} There is no directory {name!r} here, and that is no name on the Hub: check the path."
        ) from error
    except BankUnavailable as error:
        raise BankUnavailable(f"{unknown} {error}") from error


def _asked(
    name: str,
    file: str,
    repo_type: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    force_download: bool,
) -> Path | None:
    """`file_beside` of a name on the Hub, with the errors of its client."""
    offline, refused = local_files_only or constants.HF_HUB_OFFLINE, None
    if not offline:
        url = hf_hub_url(name, file, repo_type=repo_type, revision=revision)
        try:  # the download waits for minutes where the Hub does not answer
            get_hf_file_metadata(url, token=token, timeout=SECONDS, library_name=LIBRARY)
        except RevisionNotFoundError:
            raise
        except EntryNotFoundError:
            pass  # the download notes that in the cache
        except (HTTPError, OfflineModeIsEnabled) as error:
            if force_download:
                raise
            offline, refused = True, error
    try:
        return Path(
            hf_hub_download(
                name,
                file,
                repo_type=repo_type,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                library_name=LIBRARY,
                etag_timeout=SECONDS,
                local_files_only=offline,
                force_download=force_download and not offline,
            )
        )
    except LocalEntryNotFoundError:
        # Neither a path nor None: the cache has noted that the revision has no such file.
        if try_to_load_from_cache(name, file, cache_dir, revision, repo_type) is not None:
            return None
        if refused is not None:
            raise refused from None
        raise
    except EntryNotFoundError:
        return None
