"""`msa-hf plan`: options and models become shapes and tiers."""

import json
from pathlib import Path

import pytest
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.bank.tiered.hardware import RATES, Tiers
from msa_hf.bank.tiered.plan import Reserves, plan_placement
from msa_hf.bank.tiered.shapes import GB, BankShape
from msa_hf.cli import command_line as cli

SHAPE = BankShape.for_tokens(100_000_000, [(8, 128)] * 18)  # the 4B shape
ROOM = ("--device-memory", "141GB", "--host-memory", "128GiB", "--disk", "64GiB")
SHAPE_4B = ("--tokens", "100M", "--layers", "18", "--groups", "8", "--head-dim", "128")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["plan", *arguments]) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_command_plans_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    expected = plan_placement(SHAPE, Tiers(141 * GB, 2**37, 2**36, RATES["H200"]), reserves=Reserves(weights=8 * GB))
    assert run(capsys, *SHAPE_4B, *ROOM, "--gpu", "H200", "--weights", "8GB") == f"{expected}\n"
    record = json.loads(run(capsys, *SHAPE_4B, *ROOM, "--keys", "fp8", "--content", "@disk", "--gpus", "2", "--json"))
    assert [part["format"] for part in record["parts"][:2]] == ["fp8", "bf16"]
    assert record["parts"][1]["tier"] == "disk" and record["gpus"] == 2
    small = (*SHAPE_4B, "--device-memory", "24GB", *ROOM[2:], "--weights", "8GB", "--keys", "fp8@host", "--json")
    small = (*small, "--content", "fp8@host")
    for asked, layers in (("fit", 6), ("2", 2), ("0", None)):
        parts = {part["part"]: part["bytes"] for part in json.loads(run(capsys, *small, "--resident", asked))["parts"]}
        assert parts.get("resident keys") == (layers and SHAPE.key_bytes("fp8", slice(layers)))
    assert "a number of layers or fit" in run(capsys, *small, "--resident", "some", code=2)
    given = json.loads(run(capsys, *SHAPE_4B, *ROOM, "--gpu", "H200", "--matmul", "300T", "--json"))["rates"]
    assert (given["matmul"], given["narrow_matmul"], given["copy"]) == (300e12, None, RATES["H200"].copy)
    printed = run(capsys, *SHAPE_4B, *ROOM, "--bandwidth", "2T", "--matmul", "300T")
    assert "routing 32 tokens, all layers: 28.8 ms" in printed and "given by the caller" in printed


@pytest.mark.parametrize("retrofitted", [True, False])
def test_command_reads_a_models_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], retrofitted: bool) -> None:
    """The memory layers and chunks of a checkpoint with a memory, or those that a retrofit would give a plain one."""
    model = base_model("qwen3")
    config = model.config
    layers, chunk_size, groups, dim = config.num_hidden_layers // 2, 64, config.num_key_value_heads, config.head_dim
    layers = config.num_hidden_layers - layers
    if retrofitted:
        layers, chunk_size = 1, 16
        model = MSAForCausalLM.from_base(model, memory_layers=[config.num_hidden_layers - 1], chunk_size=16)
    model.save_pretrained(tmp_path)
    known = ("--tokens", "1M", "--model", str(tmp_path), *ROOM, "--json")
    record = json.loads(run(capsys, *known))
    assert record["layers"] == [[groups, dim]] * layers
    assert record["chunks"] == BankShape.for_tokens(10**6, [(1, 1)], chunk_size=chunk_size).chunks
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert record["tiers"]["device"]["reserved"] == weights + 5 * GB
    for option, value, expected in (
        ("--groups", groups + 3, [[groups + 3, dim]] * layers),
        ("--head-dim", dim + 3, [[groups, dim + 3]] * layers),
        ("--layers", layers + 1, [[groups, dim]] * (layers + 1)),
    ):  # options come before what the model says
        assert json.loads(run(capsys, *known, option, str(value)))["layers"] == expected


def test_amounts(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--layers", "1", "--groups", "1", "--head-dim", "1", "--document-tokens", "1", "--json")
    for text, value in (("7", 7), ("1K", 1000), ("1.5GB", 1_500_000_000), ("2GiB", 2**31), ("1TB", 10**12), ("3B", 3)):
        room = ("--device-memory", "none", "--host-memory", "99GB", "--disk", text, "--disk-reserve", "0")
        found = json.loads(run(capsys, *shape, "--tokens", "0", *room))
        assert found["tiers"]["disk"]["capacity"] == value
    for text, documents in (("2K", 2000), ("1B", 10**9), ("0.5M", 500_000)):
        assert json.loads(run(capsys, *shape, "--tokens", text, *ROOM))["documents"] == documents


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tokens", "1M"], "--layers"),
        (["--layers", "1", "--groups", "1", "--head-dim", "1"], "--tokens"),
        (["--tokens", "1M", "--model", "no-such"], "no-such"),
        (["--tokens", "1.5"], "1.5"),
        (["--tokens", "-1"], "--tokens"),
        (["--tokens", "1M", "--disk", "1XB"], "1XB"),
        (["--tokens", "1B", *SHAPE_4B[2:], *ROOM], "9 GPUs"),
        (["--tokens", "1", "--layers", "1", "--groups", "1", "--head-dim", "1", *ROOM, "--keys", "fp4"], "fp4"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = run(capsys, *arguments, code=2)
    assert message.startswith("msa-hf: error: ") and said in message and message.count("\n") == 1


def test_what_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ("--tokens", "1M", "--model", str(tmp_path), *ROOM)
    assert f"{tmp_path}: " in run(capsys, *known, code=2)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert f"{tmp_path}: an adapter of PEFT, of the base some/base" in run(capsys, *known, code=2)
