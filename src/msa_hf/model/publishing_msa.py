"""Putting files of a folder on the Hub as one commit, so that every revision has all of a bank or of a checkpoint."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .cards_msa import CARD, is_made_by_transformers, is_ours
from .hub_msa import LIBRARY, SECONDS, BankUnavailable, hub_errors, knock

MANY_FILES, MANY_BYTES = 100, 10 * 2**30  # above, files go ahead in as many commits as they take


def publish(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    *,
    repo_type: str,
    message: str,
    last: Sequence[str] = (),
    outdated: Callable[[str], bool] = lambda name: False,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put files on the Hub, in a repository that is made where missing. A card that a person wrote there stays.

    Very many or large files go first, by `HfApi.upload_folder`, which may take several commits and goes on where an
    interrupted call stopped; `last` comes in the last commit all the same.

    Args:
        folder: where the files lie.
        names: of the files, relative to it, with slashes.
        repo_id: `user/name`, or `name` for the user who is logged in.
        repo_type: `"model"` or `"dataset"`.
        message: of the commit.
        last: those of `names` without which the others say nothing.
        outdated: tells by its name whether a file of the repository is removed in the same commit.
        private: of a repository that is made; None: as the Hub does by default, which is public for most users. True
            refuses one that is there and public.
        revision: a branch, made where missing. Default: main.
        token: default that of `hf auth login`, or of the variable HF_TOKEN.
        description: of the commit.
        create_pr: open a pull request instead.

    Raises:
        BankUnavailable: where the Hub refuses or cannot be reached, with the remedy.
    """
    api = HfApi(token=token, library_name=LIBRARY)
    with hub_errors(f"the {repo_type} {repo_id!r}", revision):
        knock()
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type, timeout=SECONDS).private:
            raise BankUnavailable(
                f"The {repo_type} {repo_id!r} is there already and is public, so `private=True` would not hold. Make "
                "it private in its settings on the Hub, give another name, or leave `private` out. Nothing was sent."
            )
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        ahead = [name for name in names if name not in last and name != CARD]
        if not create_pr and _are_many(folder, ahead):
            api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in ahead],
                commit_message=f"{message} (data)",
                revision=revision,
            )
            names = [name for name in names if name not in ahead]
        head = api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=SECONDS).sha
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=head)
        if CARD in there and not _card_is_ours(repo_id, repo_type, head, token):
            names = [name for name in names if name != CARD]
        kept = {*names, *ahead}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in there if name not in kept and outdated(name)
        ]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )


def _are_many(folder: Path, names: Sequence[str]) -> bool:
    return len(names) > MANY_FILES or sum((folder / name).stat().st_size for name in names) > MANY_BYTES


def _card_is_ours(repo_id: str, repo_type: str, commit: str | None, token: str | bool | None) -> bool:
    try:
        path = hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=commit, token=token, etag_timeout=SECONDS)
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError as well
        raise BankUnavailable(
            f"The card of the {repo_type} {repo_id!r} could not be read ({error.__cause__ or error}), and may be a "
            "person's. The commit was not made: try again."
        ) from error
    except EntryNotFoundError:
        return True
    return is_ours(Path(path)) or is_made_by_transformers(Path(path))
