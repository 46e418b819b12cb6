"""The tree at the top of docs/architecture.md is that of the repository."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "msa_hf"


def named_in_tree() -> list[tuple[Path, str]]:
    """The names of folders and files that the tree gives, each with the folder that it stands under."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (.*)$", text.partition("\n**")[0], flags=re.MULTILINE)
    found: list[tuple[Path, str]] = []
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    for line in lines:
        indent = len(line) - len(line.lstrip())
        first = line.split()[0]
        if indent < 20:  # an entry; what is farther right goes on with the one before
            while folders[-1][0] >= indent:
                folders.pop()
            if first.endswith("/"):
                found.append((folders[-1][1], first.rstrip("/")))
                folders.append((indent, folders[-1][1] / first))
                line = line.replace(first, "", 1)
        names = re.findall(r"(?<![\w/.*-])\w+(?:\.py\b|/(?=[\s,.;:]|$))", line)
        found += [(folders[-1][1], name.rstrip("/")) for name in names]
    return found


def test_what_the_tree_names_is_there() -> None:
    tree = named_in_tree()
    assert len(tree) > 100
    missing = [f"{folder.relative_to(ROOT)}: {name}" for folder, name in tree if not (folder / name).exists()]
    # What every folder of a folder has is named once: reference.py, triton.py.
    missing = [item for item in missing if not list((ROOT / item.split(": ")[0]).glob(f"*/{item.split(': ')[1]}"))]
    assert missing == []


def test_the_tree_names_every_folder_and_what_travels() -> None:
    named = {folder / name for folder, name in named_in_tree()}
    folders = {path.parent for path in PACKAGE.glob("**/*.py")} - {PACKAGE}
    files = {path for part in (PACKAGE, PACKAGE / "model") for path in part.glob("*.py") if path.stem[0] != "_"}
    tests = {path.parent for path in (ROOT / "tests").glob("*/*.py")}
    assert sorted(path.relative_to(ROOT).as_posix() for path in (folders | files | tests) - named) == []
