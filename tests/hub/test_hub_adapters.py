"""Adapters on the Hub, given to commands that take checkpoints: called adapters, with their base and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants, hf_hub_download

from msa_hf.cli.loading import check_bank, checkpoint
from msa_hf.user_errors import UserError

CONFIG = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(hub: FakeHub, config: object) -> None:
    hub.make("model", "user/adapter", {"adapter_config.json": json.dumps(config).encode()})


def refused(name: str) -> str:
    with pytest.raises(UserError) as error:
        checkpoint(name)
    return str(error.value)


def test_an_adapter_is_named_with_its_base_and_how_to_merge_it(hub: FakeHub) -> None:
    put(hub, CONFIG)
    said = refused("user/adapter")
    assert said.startswith("user/adapter: an adapter of PEFT, of the base some/base, and no checkpoint; make one")
    assert (
        "`hf download user/adapter --local-dir adapter && python scripts/merge_adapter.py --base some/base --adapter "
        "adapter --out OUT`" in said
    )


def test_a_learned_prompt_is_no_matter_of_merging(hub: FakeHub) -> None:
    put(hub, {**CONFIG, "peft_type": "PREFIX_TUNING"})
    said = refused("user/adapter")
    assert "a learned prompt of PEFT (PREFIX_TUNING), of the base some/base" in said and "merge" not in said


@pytest.mark.parametrize("config", [{}, [1], {"base_model_name_or_path": None}, {"base_model_name_or_path": ["a"]}])
def test_an_adapter_that_does_not_say_of_which_base(hub: FakeHub, config: object) -> None:
    put(hub, config)
    said = refused("user/adapter")
    assert "whose base its adapter_config.json does not name" in said and "--base BASE --adapter adapter" in said


def test_a_name_of_the_base_is_no_command(hub: FakeHub) -> None:
    put(hub, {"base_model_name_or_path": "x; rm -rf y"})
    assert "--base 'x; rm -rf y' --adapter" in refused("user/adapter")


def test_an_adapter_in_the_cache_is_known_offline(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    put(hub, CONFIG)
    hf_hub_download("user/adapter", "adapter_config.json")
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "an adapter of PEFT, of the base some/base" in refused("user/adapter")


def test_checkpoints_with_an_adapter_beside_them_are_checkpoints(hub: FakeHub) -> None:
    files = {"adapter_config.json": json.dumps(CONFIG).encode(), "config.json": b"{}"}
    hub.make("model", "user/both", files)
    assert checkpoint("user/both") == "user/both"


def test_what_is_on_the_hub_and_is_something_else(hub: FakeHub) -> None:
    """It is not said to be missing, or kept from whoever asks."""
    hub.make("model", "user/empty")
    hub.make("dataset", "user/texts")
    assert "and the model of that name on the Hub has no config.json" in refused("user/empty")
    with pytest.raises(UserError, match=r"and the dataset of that name on the Hub has no manifest\.json"):
        check_bank("user/texts")
    assert "and the Hub has no such model that you may read" in refused("user/nothing")
    hub.fail["/user/empty/resolve/main/adapter_config.json"] = 503
    assert "has no config.json" in refused("user/empty")
