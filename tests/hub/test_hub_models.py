"""The card of a checkpoint, saved or on the Hub: what it says, and that a person's is never replaced."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard, hf_hub_download
from scripted import byte_tokenizer
from small_corpus import save_base

from msa_hf import MSAForCausalLM, MSAModel
from msa_hf.bank import BankUnavailable
from msa_hf.generation import COMPACT, protocol_beside
from msa_hf.model import publishing_msa
from msa_hf.model.checkpoint_msa import REMOTE_FILES
from msa_hf.training import peft_config
from msa_hf.training.adapter_memory import save_adapter_memory

MARK = "<!-- Written by msa_hf ("


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("secret-place") / "base")


@pytest.fixture
def made(base: Path) -> Any:
    return MSAForCausalLM.from_base(base)


def card_of(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


def put(hub: FakeHub, name: str, directory: Path, **files: bytes) -> None:
    hub.make("model", name, {path.name: path.read_bytes() for path in directory.iterdir()} | files)


def test_what_a_card_says(made: Any, base: Path, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert {"msa_hf", "memory", "llama"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (
        card.data.base_model is None and card.data.license is None and "license of the base is not known" in card.text
    )
    for said in (
        "| memory layers | 1 |",
        "| chunk size | 64 tokens |",
        "| routers trained | no: ",
        "trust_remote_code",
    ):
        assert said in card.text
    assert str(base) not in str(card) and "secret-place" not in str(card), "where it lay is nobody's business"

    made.config.routers_trained = True
    made.save_pretrained(tmp_path)
    assert "| routers trained | yes |" in card_of(tmp_path).text, "ours is brought up to date"
    made.config.routers_trained = None
    made.save_pretrained(tmp_path / "unknown")
    assert "| routers trained | not known |" in card_of(tmp_path / "unknown").text


def test_the_license_of_the_base_and_of_what_it_became(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some/other\n---\n# base\n")
    try:
        MSAForCausalLM.from_base(base).save_pretrained(tmp_path / "one")
    finally:
        (base / "README.md").unlink()
    MSAForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        card = card_of(tmp_path / name)
        assert card.data.license == "apache-2.0" and card.data.base_model is None
        assert "not known here" not in card.text


@pytest.mark.parametrize(
    "bad", [b"---\nlicense: [a\n---\n", b"\xff\xfe\x00", b"---\n- a\n---\n", b"---\nlicense: {a: 1}\n---", b"x" * 2**21]
)
def test_cards_that_say_nothing(base: Path, tmp_path: Path, bad: bytes) -> None:
    (base / "README.md").write_bytes(bad)
    try:
        MSAForCausalLM.from_base(base).save_pretrained(tmp_path)
    finally:
        (base / "README.md").unlink()
    assert card_of(tmp_path).data.license is None


def test_a_card_of_a_person_stays(made: Any, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    ours = (tmp_path / "README.md").read_text()
    for theirs in (
        ours.replace("# A llama", "# My llama"),
        "# Mine",
        "",
        ours + "\nMore.\n",
        ours.replace(MARK, "<!--"),
    ):
        (tmp_path / "README.md").write_text(theirs)
        made.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == theirs
    (tmp_path / "README.md").write_bytes(ours.replace("\n", "\r\n").encode())  # as a checkout on Windows has it
    made.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == ours
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "elsewhere.md")
    made.save_pretrained(tmp_path)
    assert not (tmp_path / "elsewhere.md").exists()
    made.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_headless_model(base: Path, tmp_path: Path) -> None:
    MSAForCausalLM.from_base(base).save_pretrained(tmp_path / "whole")
    MSAModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert card.data.pipeline_tag is None and "MSAModel.from_pretrained" in card.text and "AutoModel." in card.text


def test_adapters_of_peft_keep_its_card(made: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made.save_pretrained(tmp_path)
    adapted = peft.get_peft_model(made, peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.library_name == "peft" and MARK not in str(card)
    adapted.save_pretrained(tmp_path)  # PEFT adds to a card that is there
    both = (tmp_path / "README.md").read_text()
    adapted.unload().save_pretrained(tmp_path)
    assert card_of(tmp_path).data.library_name == "peft" and (tmp_path / "README.md").read_text() == both


def test_pushing(hub: FakeHub, base: Path, tmp_path: Path) -> None:
    put(hub, "user/base", base, **{"README.md": b"---\nlicense: mit\n---\n# base\n"})
    byte_tokenizer().push_to_hub("user/model", private=True)  # whose empty card is transformers'
    model = MSAForCausalLM.from_base("user/base")
    info = model.push_to_hub("user/model", private=True, commit_message="First", tags=["notes"])
    there = hub.model("user/model")
    assert there.messages[-1] == "First" and there.branches["main"] == info.oid
    assert {*REMOTE_FILES, "model.safetensors", "config.json", "tokenizer.json"} <= set(there.files())
    card = ModelCard(there.files()["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("user/base", "mit")
    assert "notes" in card.data.tags and "# model\n" in card.text and 'from_pretrained("user/model")' in card.text

    loaded = MSAForCausalLM.from_pretrained("user/model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    loaded.config.routers_trained = True
    loaded.push_to_hub("user/other", revision="draft")
    other = hub.model("user/other")
    assert ModelCard(other.files("draft")["README.md"].decode()).data.base_model == "user/base"
    assert set(other.files()) == {".gitattributes"}

    byte_tokenizer().push_to_hub("user/model")
    loaded.push_to_hub("user/model")
    assert "| routers trained | yes |" in there.files()["README.md"].decode(), "still ours after a tokenizer was pushed"
    there.commit({**there.files(), "README.md": b"# Mine\n"}, "by hand")
    loaded.push_to_hub("user/model")
    assert there.files()["README.md"] == b"# Mine\n"
    with pytest.raises(BankUnavailable, match=r"the model 'user/model'.* log in"):
        loaded.push_to_hub("user/model", token="hf_nonsense")


def test_a_protocol_goes_beside_the_checkpoint(hub: FakeHub, made: Any) -> None:
    made.push_to_hub("user/model", private=True)
    assert protocol_beside("user/model") is None
    COMPACT.push_to_hub("user/model", commit_message="Its protocol")
    there = hub.model("user/model")
    assert there.messages[-1] == "Its protocol" and "model.safetensors" in there.files()
    assert protocol_beside("user/model") == COMPACT
    with pytest.raises(BankUnavailable, match=r"the model 'user/model'.* log in"):
        COMPACT.push_to_hub("user/model", token="hf_nonsense")


def test_a_card_that_cannot_be_read_is_not_replaced(hub: FakeHub, made: Any, patch: pytest.MonkeyPatch) -> None:
    """It may be a person's; a commit that the Hub takes all the same would be the end of it."""
    there = hub.make("model", "user/model", {"README.md": b"# Mine\n"})
    patch.setattr(publishing_msa, "hf_hub_download", partial(hf_hub_download, local_files_only=True))  # as unreachable
    with pytest.raises(BankUnavailable, match=r"The card of the model 'user/model' could not be read .* try again"):
        made.push_to_hub("user/model")
    assert there.files()["README.md"] == b"# Mine\n" and len(there.commits) == 1


def test_saving_and_pushing_at_once(hub: FakeHub, made: Any, tmp_path: Path) -> None:
    directory = tmp_path / "notes"
    directory.mkdir()
    (directory / "README.md").write_text("# Mine\n")
    (directory / "log.txt").write_text("not the model's")
    made.save_pretrained(directory, push_to_hub=True)
    files = hub.model("user/notes").files()
    assert (directory / "README.md").read_text() == "# Mine\n" and files["README.md"] == b"# Mine\n"
    assert {*REMOTE_FILES, "model.safetensors"} <= set(files) and "log.txt" not in files


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_the_hub_is_compared_with_the_model(hub: FakeHub, made: Any, tmp_path: Path, caplog: Any) -> None:
    peft = pytest.importorskip("peft")
    made.save_pretrained(tmp_path / "base")
    trained = MSAForCausalLM.from_pretrained(tmp_path / "base", chunk_size=8)
    peft.get_peft_model(trained, peft_config(trained, r=2)).save_pretrained(tmp_path / "adapter")
    put(hub, "user/silent", tmp_path / "adapter")
    save_adapter_memory(trained.config, tmp_path / "adapter")
    put(hub, "user/adapter", tmp_path / "adapter")

    def load(name: str, **fields: Any) -> Any:
        return peft.PeftModel.from_pretrained(MSAForCausalLM.from_pretrained(tmp_path / "base", **fields), name)

    with pytest.raises(ValueError, match="'user/adapter' was trained with chunk_size=8"):
        load("user/adapter")
    with pytest.raises(ValueError, match=r"'user/adapter' is an adapter of PEFT and no checkpoint.*chunk_size=8"):
        MSAForCausalLM.from_pretrained("user/adapter")
    assert load("user/adapter", chunk_size=8) and load("user/silent")
    assert not any("memory.json" in line for line in caplog.messages)
    hub.fail["/user/adapter/resolve/main/memory.json"] = 503
    with pytest.raises(ValueError, match="'user/adapter' was trained with chunk_size=8"):
        load("user/adapter")  # the cache has the file
    hub.make("model", "user/other", hub.model("user/adapter").files())
    hub.fail["/user/other/resolve/main/memory.json"] = 503
    assert load("user/other")
    assert any("503" in line and "not compared with the model" in line for line in caplog.messages)
