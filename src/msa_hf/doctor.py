"""`python -m msa_hf.doctor` and `msa-hf doctor`: which native operations this machine has, and why not others."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch
import transformers

from .ops import dispatch


def devices() -> list[str]:
    """The kinds of devices here that operations run on."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def examine() -> dict[str, Any]:
    """A report of what there is, as JSON values.

    Returns:
        versions; gpus (name and capability of each); extension (what was compiled in, or why there is none);
        backends: name -> operation -> None where it is there, else why not; used: device -> operation -> the backends
        that are there, in the order they are tried.
    """
    backends = {
        name: {operation: backend.probe(operation) for operation in dispatch.OPERATIONS}
        for name, backend in dispatch.BACKENDS.items()
    }
    used = {
        device: {
            operation: [
                name
                for name, backend in dispatch.BACKENDS.items()
                if backend.runs_on(device) and backends[name][operation] is None
            ]
            for operation in dispatch.OPERATIONS
        }
        for device in devices()
    }
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": dispatch.triton_version(),
        },
        "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
        "extension": dispatch.extension_info(),
        "backends": backends,
        "used": used,
    }


def described(found: dict[str, Any]) -> list[str]:
    """Say in words what `examine` found."""
    lines = [", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())]
    lines += [f"GPU {number}: {name}" for number, name in enumerate(found["gpus"])] or ["no CUDA device"]
    lines += ["", "Extension:", *(f"  {line}" for line in found["extension"].splitlines())]
    for device, operations in found["used"].items():
        lines += ["", f"On {device}, in the order they are tried:"]
        lines += [f"  {operation:<{WIDTH}}{', '.join(names)}" for operation, names in operations.items()]
    lines += ["", "Not there:"]
    for name, operations in found["backends"].items():
        reasons: dict[str, list[str]] = {}
        for operation, reason in operations.items():
            if reason is not None:
                reasons.setdefault(reason, []).append(operation)
        for reason, names in reasons.items():
            which = "" if len(names) == len(operations) else f" ({', '.join(names)})"
            lines.append(f"  {name}{which}: {reason}")
    if lines[-1] == "Not there:":
        lines[-2:] = []
    return lines


WIDTH = max(map(len, dispatch.OPERATIONS)) + 2


def main(arguments: list[str] | None = None) -> int:
    """Print what `examine` found; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m msa_hf.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    report(parser.parse_args(arguments).json)
    return 0


def report(as_json: bool) -> None:
    found = examine()
    print(json.dumps(found) if as_json else "\n".join(described(found)))


if __name__ == "__main__":
    sys.exit(main())
