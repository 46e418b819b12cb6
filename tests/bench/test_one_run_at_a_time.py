"""Every benchmark has its file for itself before it encodes anything, and frees it however it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench.chains import ChainSettings, run_chains
from msa_hf.bench.conversations import ConversationSettings, run_conversations
from msa_hf.bench.mine import MineSettings, run_mine
from msa_hf.bench.needles import NeedleSettings, run_needles
from msa_hf.bench.nested import GivenTexts
from msa_hf.bench.result import Result, ResultError
from msa_hf.bench.scaling import ScalingSettings, invented_questions, run_scaling

TEXTS = [
    f"The {number} ships left the harbor in May. They came back in June, all but {number}." for number in range(99)
]


def needles(*given: Any, **options: Any) -> Result:
    return run_needles(NeedleSettings((1500,), ("single",), ("words",), 1, 1), *given, TEXTS, **options)


def chains(*given: Any, **options: Any) -> Result:
    settings = ChainSettings((3000,), ("one_hop",), questions=1, prose_share=0.0)
    return run_chains(settings, *given, **options)


def conversations(*given: Any, **options: Any) -> Result:
    return run_conversations(ConversationSettings((1,), asked=1, arms=("bank",)), *given, **options)


def scaling(*given: Any, **options: Any) -> Result:
    return run_scaling(ScalingSettings((3000,)), *given, invented_questions(3000, 1), GivenTexts(TEXTS), **options)


def mine(*given: Any, **options: Any) -> Result:
    return run_mine(MineSettings(hops=1, depths=1, repeats=1), *given, TEXTS, **options)


@pytest.mark.parametrize("run", [needles, chains, conversations, scaling, mine])
def test_a_second_run_is_refused_while_the_first_encodes(
    run: Callable[..., Result], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoded = tmp_path / "r.json", []

    def encode(*given: Any, **options: Any) -> Any:
        encoded.append(path.read_bytes())
        if len(encoded) == 1:
            with pytest.raises(ResultError, match="another run writes to it"):
                run(*tiny, path=path, show_progress=False)
            assert path.read_bytes() == encoded[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny[0]), "encode_documents", encode)
    for runs in (1, 2):  # the interruption of the first frees the file for another one
        with pytest.raises(KeyboardInterrupt):
            run(*tiny, path=path, show_progress=False)
        assert len(encoded) == len(Result.load(path).runs) == runs
