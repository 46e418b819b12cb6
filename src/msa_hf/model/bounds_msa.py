"""Bounds of what reading a file may take: sizes that it states are compared with its bytes before anything is decoded.

A few bytes can stand for much memory: `{}` takes two in JSON and seventy in Python. What decoding takes at most is
reckoned from counts of characters here, at the cost of one pass over the bytes and no copy of them.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MEMORY = 64 * 2**20  # bytes that reading a file may take beside those of the file itself
HEADER, PER_TENSOR = 64 * 2**10, 512  # bytes of a safetensors header: once, and for each tensor
# Bytes that CPython takes at most for what begins with a character of JSON, containers and names with their places.
STRUCTURE = {"{": 232, "[": 88, ",": 48, ":": 208, '"': 32}


def structure_memory(text: str | bytes) -> int:
    """Most bytes that the values of a JSON text take when they are decoded, the characters of strings aside."""
    if isinstance(text, str):
        return sum(size * text.count(mark) for mark, size in STRUCTURE.items())
    return sum(size * text.count(mark.encode()) for mark, size in STRUCTURE.items())


def json_memory(text: bytes) -> int:
    """Most bytes that decoding a JSON text and encoding it again take."""
    width = 1 if text.isascii() else 4  # of a character where there is one outside of the first plane
    return 4 * width * len(text) + structure_memory(text)


def check_json(text: str | bytes, most: int = MEMORY) -> None:
    """Refuse a JSON text whose values take more than so many bytes beside the characters of their strings.

    Raises:
        ValueError: if they do.
    """
    if (needed := structure_memory(text)) > most:
        raise ValueError(f"{len(text)} characters with so many values that they could take {needed} bytes of memory")


def read_json(path: Path, most: int = MEMORY) -> Any:
    """Decode a JSON file of a stranger, of at most `most` bytes and values that take at most as many.

    Raises:
        ValueError: for a larger one, and for what is not JSON.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"larger than the {most} bytes that such a file may have")
    check_json(text, most)
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_header(path: Path, tensors: int) -> None:
    """Compare the header that a safetensors file states with what so many tensors need.

    Raises:
        ValueError: for a longer one.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > (most := HEADER + PER_TENSOR * tensors):
        raise ValueError(f"a header of {length} bytes, {tensors} tensors need at most {most}")


def bytes_there(directory: Path) -> int:
    """Bytes of the files of a directory as they lie on the disk: holes are none, and no file counts twice."""
    found: dict[tuple[int, int], int] = {}
    for path in directory.iterdir():
        try:
            status = path.stat()
        except OSError:  # a link to nothing, or a file that was just removed
            continue
        if stat.S_ISREG(status.st_mode):
            blocks = getattr(status, "st_blocks", None) if os.name != "nt" else None
            size = status.st_size if blocks is None else min(status.st_size, 512 * blocks)
            found[status.st_dev, status.st_ino] = size
    return sum(found.values())
