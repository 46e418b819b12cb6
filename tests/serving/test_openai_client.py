"""OpenAI's own client talks to the server."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import MODEL, Served, serving

from msa_hf.serving.keys import ApiKey

openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")
KEY = "sk-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "Where is the reef?"}]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("openai") / "bank", keys=[ApiKey.of(KEY)]) as served:
        yield served


@pytest.fixture(scope="module")
def client(guarded: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=f"{guarded.url}v1", max_retries=0) as made:
        yield made


def test_chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"trace": True})
    text = whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
    assert whole.sources[0]["key"] and whole.trace["rounds"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage and chunks[-2].sources == whole.sources
    again = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_completion_tokens=3).choices


def test_the_example_of_the_document_runs(guarded: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for old, new in (("http://127.0.0.1:8000/", guarded.url), ('"none"', repr(KEY)), ('"my-msa"', repr(MODEL))):
        assert old in example
        example = example.replace(old, new)
    exec(compile(example, "serving.md", "exec"), {})
    assert "'passage': " in capsys.readouterr().out


def test_completions_and_models(client: openai.OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt=["Where is the reef?", "Where is the pine?"], max_tokens=4)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert [item.id for item in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, guarded: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3)
    assert bad.value.param == "n" and bad.value.request_id
    stranger = openai.OpenAI(api_key="sk-wrong", base_url=f"{guarded.url}v1", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError, match="too long"):
        list(
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 9000}], stream=True)
        )


def test_an_error_behind_the_first_piece_ends_the_stream(
    client: openai.OpenAI, guarded: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa_hf.serving.row_control import RowControl

    look = RowControl._look

    def breaks(self: RowControl, question: object, tokens: list[int]) -> bool:
        if len(tokens) > 3:
            raise RuntimeError("the device is lost")
        question.extend("piece")
        return look(self, question, tokens)

    monkeypatch.setattr(RowControl, "_look", breaks)
    pieces = []
    with pytest.raises(openai.APIError, match="its log says why"):
        for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, max_tokens=8):
            pieces.append(chunk.choices[0].delta.content)
    assert pieces and pieces[0].startswith("piece")
