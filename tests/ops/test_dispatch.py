"""Which backend runs a call, and what is said about it."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from battery import offsets_of, why_not
from torch import Tensor

from msa_hf import doctor, ops
from msa_hf.cli import main
from msa_hf.ops import BACKENDS, BackendError, dispatch, use_backend

SOURCES = [*(Path(__file__).parents[2] / "csrc").glob("**/*.cpp")]
FEATURES = {"queries": torch.float32, "keys": torch.float32, "multiple": 8, "width": 8, "k": 4}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch) -> None:
    """Every test starts with no backend asked for and nothing logged."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_wanted", None)


def call(backend: str | None = None) -> tuple[Tensor, Tensor]:
    mask = torch.ones(1, 2, dtype=torch.bool)
    return ops.route_documents(torch.ones(1, 2, 8), mask, torch.eye(8), offsets_of([4, 4]), 1, backend=backend)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_the_battery_runs_on(operation, backend, device) -> None:
    """Not a test of anything: a skip here names a backend that the other tests left out, and why."""
    if BACKENDS[backend].runs_on(device) and (reason := why_not(operation, backend, device)) is not None:
        pytest.skip(f"{backend} on {device}: {reason}")


@pytest.mark.skipif(not SOURCES, reason="the sources of the extension are not here")
def test_both_languages_declare_the_same_schemas() -> None:
    """csrc/*.cpp and the operations' folders."""
    declared = [
        re.sub(r'"\s*"|"', "", literals).strip()
        for path in SOURCES
        for literals in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', path.read_text())
    ]
    public = [schema for schema in declared if not schema.startswith(("_", "build_info"))]
    assert sorted(public) == sorted(name + operation.schema for name, operation in dispatch.OPERATIONS.items())


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_the_extension_has_the_schemas_of_the_package(operation) -> None:
    """An extension built from other sources than these is found out."""
    reason = dispatch.load_extension()
    if reason is not None:
        pytest.skip(reason)
    if all(BACKENDS[backend].probe(operation) for backend in ("cpp", "cuda")):
        pytest.skip("it has no kernel for this")
    name = BACKENDS["pytorch"].namespace
    assert BACKENDS["pytorch"].probe(operation) is None
    theirs, ours = (str(dispatch.operator(operation, space).default._schema) for space in ("msa_hf", name))
    assert theirs.removeprefix("msa_hf::") == ours.removeprefix(f"{name}::")


def test_the_first_backend_that_takes_the_call_runs_it(monkeypatch) -> None:
    """In the order CUDA, Triton, C++, PyTorch, among those for the device."""
    assert list(BACKENDS) == ["cuda", "triton", "cpp", "pytorch"]
    tried = []
    for name, backend in BACKENDS.items():
        monkeypatch.setitem(
            BACKENDS,
            name,
            dispatch.Backend(
                name, backend.namespace, backend.devices, lambda operation, name=name: tried.append(name) or "absent"
            ),
        )
    with pytest.raises(AssertionError, match="the reference takes every call"):
        dispatch.choose("route_documents", "cuda", **FEATURES)
    assert list(dict.fromkeys(tried)) == ["cuda", "triton", "pytorch"]
    tried.clear()
    with pytest.raises(AssertionError, match="the reference takes every call"):
        dispatch.choose("route_documents", "cpu", **FEATURES)
    assert list(dict.fromkeys(tried)) == ["cpp", "pytorch"]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_request_that_cannot_be_met_names_what_is_missing(backend) -> None:
    """Never another backend instead."""
    if "cpu" in BACKENDS[backend].also():
        pytest.skip("Triton interprets")
    with pytest.raises(BackendError, match=rf"route_documents cannot run on the backend '{backend}': .*not on cpu"):
        call(backend)
    with use_backend(backend), pytest.raises(BackendError, match="not on cpu"):
        call()


def test_a_limit_is_said_and_not_passed_over_in_silence(monkeypatch, caplog) -> None:
    """A backend that is there but refuses the call: a warning, once, and the next one; an error where it was wanted."""
    if BACKENDS["cpp"].probe("route_documents") is not None:
        pytest.skip("the reference is the only backend for the CPU here")
    limits = dispatch.OPERATIONS["route_documents"].limits
    monkeypatch.setitem(limits, "cpp", lambda **_: "rows of 8 numbers are too short")
    with caplog.at_level(logging.INFO, "msa_hf.ops.dispatch"):
        for _ in range(3):
            call()
    refusals = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in refusals] == [
        "route_documents on cpu does not run on the backend cpp: rows of 8 numbers are too short."
    ]
    chosen = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert chosen == ["route_documents on cpu runs on the backend pytorch."]
    with pytest.raises(BackendError, match="rows of 8 numbers are too short"):
        call("cpp")


def test_a_backend_that_is_not_there_is_no_warning(monkeypatch, caplog) -> None:
    """It is said once, at a level that is not shown by default."""
    absent = dispatch.Backend("cpp", "msa_hf", ("cpu",), lambda operation: "it was not built")
    monkeypatch.setitem(BACKENDS, "cpp", absent)
    with caplog.at_level(logging.INFO, "msa_hf.ops.dispatch"):
        call()
        call()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "route_documents on cpu does not run on the backend cpp: it was not built."),
        (logging.INFO, "route_documents on cpu runs on the backend pytorch."),
    ]


def test_use_backend_holds_within_and_ends() -> None:
    """Nested, and after an error inside; a name at the call counts more."""
    names = {space: name for name, space in (("cpp", "msa_hf"), ("pytorch", "msa_hf_pytorch"))}
    before = dispatch.choose("route_documents", "cpu", **FEATURES)
    with use_backend("pytorch"):
        assert names[dispatch.choose("route_documents", "cpu", **FEATURES)] == "pytorch"
        with use_backend(None):
            assert dispatch.choose("route_documents", "cpu", **FEATURES) == before
        with pytest.raises(RuntimeError), use_backend(None):
            raise RuntimeError
        assert names[dispatch.choose("route_documents", "cpu", **FEATURES)] == "pytorch"
    assert dispatch.choose("route_documents", "cpu", **FEATURES) == before
    with pytest.raises(ValueError, match="must be one of"), use_backend("fortran"):
        pass


def test_a_backend_asked_for_also_runs_the_derivative() -> None:
    """`pool_chunks` on one backend takes its gradient on the same one where that has it."""
    for backend in ("cpp", "pytorch"):
        if BACKENDS[backend].probe("pool_chunks_backward") is not None:
            continue
        seen = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, seen=seen):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        leaves = [torch.randn(4, 1, 8, requires_grad=True) for _ in range(3)]
        with Watch():
            content, *_ = ops.pool_chunks(*leaves, offsets_of([4]), 2, backend=backend)
            content.sum().backward()
        space = BACKENDS[backend].namespace
        assert [name for name in seen if name.startswith("msa_hf")] == [
            f"{space}.pool_chunks.default",
            f"{space}.pool_chunks_backward.default",
        ]


def test_size_classes() -> None:
    """What limits see in place of numbers that torch.compile may not know."""
    assert [dispatch.size_class(size) for size in (1, 2, 3, 8, 9, 1024, 1025)] == [1, 2, 4, 8, 16, 1024, 2048]
    assert [dispatch.alignment(size) for size in (1, 6, 8, 24, 64, 1024, 1000)] == [1, 2, 8, 8, 64, 64, 8]


def test_doctor_says_what_runs_and_why_others_do_not(capsys) -> None:
    """Every backend is either used or has a reason; `msa-hf doctor` and `--json` say the same."""
    found = doctor.examine()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text == "\n".join(doctor.described(found)) + "\n"
    for name, operations in found["backends"].items():
        for operation, reason in operations.items():
            used = [device for device, row in found["used"].items() if name in row[operation]]
            assert bool(used) != bool(reason)
            assert reason is None or f"{name}: {reason}" in text or f"{operation}): {reason}" in text or reason in text
    chosen = dispatch.choose("route_documents", "cpu", **FEATURES)
    first = found["used"]["cpu"]["route_documents"][0]
    assert BACKENDS[first].namespace == chosen
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_doctor_without_an_extension(monkeypatch) -> None:
    """The reason stands where the extension would, and C++ is listed with it."""
    monkeypatch.setattr(dispatch, "load_extension", lambda: "the extension was not built")
    found = doctor.examine()
    assert found["extension"] == "the extension was not built"
    assert found["used"]["cpu"]["route_documents"] == ["pytorch"]
    assert "  cpp: the extension was not built" in doctor.described(found)


def test_an_extension_that_does_not_load_is_a_reason_and_no_crash(tmp_path) -> None:
    """No file, and a broken one."""
    assert "was not built" in str(dispatch.load_library(tmp_path))
    (tmp_path / "_C.so").write_bytes(b"not a library")
    reason = dispatch.load_library(tmp_path)
    assert reason is not None and reason.startswith("the extension _C.so does not load: ") and "\n" not in reason
