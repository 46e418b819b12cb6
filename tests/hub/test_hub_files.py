"""Files beside a checkpoint on the Hub: there, known to be missing, or not to be found out, which is an error."""

from __future__ import annotations

import contextlib
import re
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, point_to
from huggingface_hub import constants, hf_hub_download
from small_corpus import save_base

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import BankUnavailable
from msa_hf.cli.bench.options import fusion_of
from msa_hf.cli.loading import protocol_of
from msa_hf.generation import COMPACT, PromptProtocol, protocol_beside
from msa_hf.model import hub_files_msa
from msa_hf.model.hub_files_msa import file_beside
from msa_hf.pipeline import MemoryTextGenerationPipeline
from msa_hf.retrieval import FusionWeights, Searcher
from msa_hf.retrieval.fusion import fusion_beside
from msa_hf.retrieval.searcher import _weights_on_hub
from msa_hf.training import finetune
from msa_hf.training.settings import SettingError
from msa_hf.user_errors import UserError

NAME, NOBODY = "user/model", "http://127.0.0.1:9"  # discard; nothing listens there
PROTOCOL, WEIGHTS = "memory_protocol.json", FusionWeights(("router", "lexical"), "lexical")
BESIDE: dict[str, Callable[[str], object]] = {PROTOCOL: protocol_beside, "fusion.json": fusion_beside}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of a checkpoint that has all that may lie beside one."""
    COMPACT.save_pretrained(tmp_path)
    WEIGHTS.save_pretrained(tmp_path)
    return {"config.json": b"{}", **{name: (tmp_path / name).read_bytes() for name in BESIDE}}


def refuse(hub: FakeHub, patch: pytest.MonkeyPatch, how: str, cache: Path) -> contextlib.AbstractContextManager[Any]:
    """Have the Hub not say what it has."""
    if how == "offline":
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "nobody":
        point_to(patch, NOBODY, cache)
    elif how == "gated":
        hub.model(NAME).gated = True
        patch.setenv("HF_TOKEN", "hf_stranger")
    elif how == "private":
        hub.model(NAME).private = True
        patch.delenv("HF_TOKEN")
    elif how == "token":
        patch.setenv("HF_TOKEN", "hf_nonsense")
    elif how.isdecimal():
        hub.fail[f"/{NAME}/resolve/"] = int(how)
    elif how == "silent":
        return silence(patch, cache)
    return contextlib.nullcontext()


@contextlib.contextmanager
def silence(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """A Hub that takes what is asked and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(patch, f"http://127.0.0.1:{silent.getsockname()[1]}", cache)
        patch.setattr(hub_files_msa, "SECONDS", 0.3)
        yield


HOW = {
    "offline": r"HF_HUB_OFFLINE is set; unset it for the first download",
    "nobody": r"Hub cannot be reached .*Check the connection",
    "silent": r"Hub cannot be reached .*ReadTimeout.*Check the connection",
    "gated": r"granted by its owner: ask for it .* log in",
    "private": r"no model 'user/model' on the Hub that you may see\. .*log in",
    "token": r"401 .*log in",
    "404": r"answered 404",
    "503": r"answered 503 .*Try again later",
}


@pytest.mark.parametrize("file", BESIDE)
@pytest.mark.parametrize("how", HOW)
def test_not_to_be_found_out(
    hub: FakeHub, files: dict[str, bytes], patch: pytest.MonkeyPatch, cache: Path, how: str, file: str
) -> None:
    """A cache that has something else of the revision does not know either."""
    hub.make("model", NAME, files)
    hf_hub_download(NAME, "config.json")
    with (
        refuse(hub, patch, how, cache),
        pytest.raises(BankUnavailable, match=f"not known if {NAME!r} has a {file}.*{HOW[how]}"),
    ):
        BESIDE[file](NAME)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("file", BESIDE)
@pytest.mark.parametrize("how", HOW)
def test_what_the_cache_knows(
    hub: FakeHub, files: dict[str, bytes], patch: pytest.MonkeyPatch, cache: Path, how: str, file: str, there: bool
) -> None:
    """A copy of the file, or that there is none: what was asked for once is known afterwards."""
    hub.make("model", NAME, files if there else {"config.json": b"{}"})
    before = BESIDE[file](NAME)
    assert (before is not None) == there
    with refuse(hub, patch, how, cache):
        assert BESIDE[file](NAME) == before


def test_a_note_is_of_one_revision(hub: FakeHub, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> None:
    there = hub.make("model", NAME, {"config.json": b"{}"})
    assert protocol_beside(NAME) is None
    first = there.branches["main"]
    there.commit(files, "with a protocol")
    assert protocol_beside(NAME) == COMPACT and protocol_beside(NAME, revision=first) is None
    there.commit({"config.json": b"{}"}, "without it")
    hf_hub_download(NAME, "config.json")  # so that the cache goes on to a revision of which it knows nothing else
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BankUnavailable, match="HF_HUB_OFFLINE"):
        protocol_beside(NAME)
    assert protocol_beside(NAME, revision=first) is None


def test_arguments_of_the_hub(hub: FakeHub, files: dict[str, bytes], patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.make("model", NAME, {f"small/{name}": data for name, data in files.items()}, private=True)
    patch.delenv("HF_TOKEN")
    options: dict[str, Any] = {"token": "hf_owner", "cache_dir": tmp_path / "other"}
    assert protocol_beside(NAME, **options) is None
    assert protocol_beside(NAME, subfolder="small", **options) == COMPACT
    with pytest.raises(BankUnavailable, match="log in"):
        protocol_beside(NAME, subfolder="small", force_download=True, cache_dir=tmp_path / "other")
    with pytest.raises(BankUnavailable, match="has no revision 'v9'"):
        protocol_beside(NAME, revision="v9", **options)
    hub.requests.clear()
    assert protocol_beside(NAME, subfolder="small", local_files_only=True, **options) == COMPACT
    with pytest.raises(BankUnavailable, match="the Hub was not asked"):
        protocol_beside("user/other", local_files_only=True)
    assert not hub.requests


def test_directories_and_what_is_nothing(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert protocol_beside(str(tmp_path)) == COMPACT and file_beside(tmp_path / "empty", PROTOCOL) is None
    assert protocol_beside(str(tmp_path / "empty")) is None
    with pytest.raises(FileNotFoundError, match=r"empty has no memory_protocol\.json"):
        PromptProtocol.from_pretrained(tmp_path / "empty")
    with pytest.raises(BankUnavailable, match="no name on the Hub: check the path"):
        protocol_beside(str(tmp_path / "gone"))
    assert not hub.requests
    with pytest.raises(BankUnavailable, match="no directory 'user/gone' here, and there is no model 'user/gone'"):
        protocol_beside("user/gone")


def test_who_asks_says_what_else_can_be_done(
    hub: FakeHub, files: dict[str, bytes], patch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    """Commands, training and pipelines; benchmarks, which weigh by what lies beside the checkpoint."""
    hub.make("model", NAME, files)
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.* Or say how it is asked: --protocol compact\|"):
        protocol_of("auto", NAME)
    assert protocol_of("none", NAME) is None
    with pytest.raises(SettingError, match="HF_HUB_OFFLINE"):
        finetune.protocol_of(NAME)
    model = MSAForCausalLM.from_base(save_base(tmp_path / "base"))
    model.name_or_path = model.config.name_or_path = NAME
    with pytest.raises(BankUnavailable, match=r"HF_HUB_OFFLINE.* Or pass `protocol`"):
        MemoryTextGenerationPipeline(model=model, tokenizer=None, memory=model)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        pytest.importorskip("tantivy")
        fusion_of(Namespace(select="hybrid", model=NAME))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert protocol_of("auto", NAME) == COMPACT and fusion_of(Namespace(select="hybrid", model=NAME)) == WEIGHTS
    assert finetune.protocol_of(NAME) == COMPACT


@pytest.mark.parametrize("name, cause", [("./missing", "no such directory"), ("/missing/model", "no such directory")])
def test_of_a_model_that_is_not_there_no_protocol_is_unknown(name: str, cause: str) -> None:
    """Also for commands that ask for the protocol before they load the model."""
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: {cause}$"):
        protocol_of("auto", name)


def test_a_search_asks_for_the_checkpoints_weights_once(
    hub: FakeHub, files: dict[str, bytes], bank: MemoryBank, patch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    """And only a hybrid's; that they are not known is said, and once."""
    hub.make("model", NAME, files)
    model = MSAForCausalLM.from_base(save_base(tmp_path / "base"))
    model.name_or_path = model.config.name_or_path = NAME
    _weights_on_hub.cache_clear()
    try:
        searcher = Searcher(bank, model=model)
        assert not hub.requests
        assert searcher.weights(("router", "lexical")) == WEIGHTS
        asked = len(hub.requests)
        assert asked and Searcher(bank, model=model).weights(("router", "lexical")) == WEIGHTS
        assert Searcher(bank, model=model, fusion="reciprocal").weights(("router", "lexical")) is None
        assert len(hub.requests) == asked

        _weights_on_hub.cache_clear()
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
        for _ in range(2):
            assert Searcher(bank, model=model).weights(("router", "lexical")) is None
        said = [record.message for record in caplog.records if record.name == _weights_on_hub.__module__]
        assert len(said) == 1 and "HF_HUB_OFFLINE" in said[0] and "pass `fusion`" in said[0]
    finally:
        _weights_on_hub.cache_clear()
