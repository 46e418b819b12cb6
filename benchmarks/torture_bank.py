"""Attacks on a bank, and a table of what was tried and what held.

    python benchmarks/torture_bank.py --minutes 60 --out table.md --json results.json
    python benchmarks/torture_bank.py --minutes 5 --seed 7 --only kills faults
    python benchmarks/torture_bank.py --case faults add:write:ENOSPC:once:3

Every attack gets its share of the minutes; one that has tried all it has leaves the rest to the others. A model that
costs nothing stands for a real one, and dictionaries say what must be there. Ends with status 1 where something did not
hold, and says how to repeat it: kills, readers and writers depend on time as well as on the seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from torture.attack import Attack, Score, Settings, Skipped, Wrong
from torture.children import ChildFailed, start_server
from torture.commits import Commits
from torture.descriptors import Descriptors
from torture.faults import Bases, Faults
from torture.flips import Flips
from torture.hostile import Hostile
from torture.kills import Kills
from torture.power import Power
from torture.readers import Readers
from torture.shim import build
from torture.writers import Writers
from tqdm import tqdm

# Of the minutes, in the order in which the attacks run.
SHARES = {
    "kills": 4,
    "power": 4,
    "flips": 4,
    "faults": 8,
    "writers": 2,
    "readers": 2,
    "hostile": 4,
    "descriptors": 2,
    "commits": 4,
}
SHOWN = 5  # failures of an attack that the table lists; the JSON has all


def attacks_of(settings: Settings, place: Path) -> dict[str, Attack]:
    """Every attack, by name, in the order in which they run."""
    bases = Bases(place / "bases")
    attacks: list[Attack] = [
        Kills(settings, bases),
        Power(settings, bases),
        Flips(settings, bases),
        Faults(settings, bases),
        Writers(settings, bases),
        Readers(settings),
        Hostile(settings, bases),
        Descriptors(settings),
        Commits(settings),
    ]
    return {attack.name: attack for attack in attacks}


def carry_out(attack: Attack, place: Path, seconds: float, bar: tqdm, only: str | None = None) -> Score:
    """Try case after case until the time is up.

    Args:
        place: a directory; nothing of the cases stays there.
        only: the name of the only case.
    """
    score, begin = Score(attack.name, attack.title), time.monotonic()
    attack.seconds = seconds
    try:
        for case in attack.cases() if only is None else [only]:
            if score.tried and time.monotonic() - begin > seconds:
                break  # at least one was tried
            bar.set_postfix_str(f"{attack.name} {case}, {len(score.failures)} failed")
            _try(attack, case, place, score)
            bar.n = min(bar.total, bar.n + (time.monotonic() - begin - score.seconds))
            bar.refresh()
            score.seconds = time.monotonic() - begin
        else:
            score.complete = True
    except Skipped as reason:
        score.skipped = str(reason)
    score.seconds = time.monotonic() - begin
    return score


def _try(attack: Attack, case: str, place: Path, score: Score) -> None:
    kind = case.split(":")[0]
    directory = Path(tempfile.mkdtemp(dir=place))
    try:
        outcome = attack.run(case, directory)
    except (Wrong, ChildFailed) as error:
        score.tried[kind] += 1
        score.failures[case] = str(error).strip()
    else:
        score.tried[kind] += outcome.times
        score.outcomes[outcome.word] += outcome.times
        for name, value in outcome.figures.items():
            score.figures[name] = score.figures.get(name, 0) + value
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# Reports --------------------------------------------------------------------------------------------------------------


def machine() -> str:
    """The processor, system and versions, in a line."""
    processor = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() if Path("/proc/cpuinfo").exists() else open(os.devnull) as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("msa-hf", "torch", "pyarrow", "safetensors"))
    system = f"{platform.system()} {platform.release()}; Python {platform.python_version()}"
    return f"{processor}, {os.cpu_count()} CPUs, {system}, {versions}"


def table(scores: list[Score], command: str) -> str:
    """A Markdown table, a row per attack, with what failed below it."""
    lines = ["| attack | what was tried | what held |", "|---|---|---|"]
    for score in scores:
        if score.skipped:
            lines.append(f"| {score.title} | left out: {score.skipped} | |")
            continue
        tried = ", ".join(sorted(score.tried))
        whole = ", which are all there are," if score.complete else ""
        total = sum(score.tried.values())
        held = "all: " if not score.failures else f"**{len(score.failures):,} failed**: "
        outcomes = ", ".join(f"{word} {count:,}" for word, count in score.outcomes.most_common())
        figures = "".join(f"; {name} {value:,.0f}" for name, value in score.figures.items() if ": " not in name)
        lines.append(
            f"| {score.title} | {total:,} ({tried}){whole} in {score.seconds:.0f} s | {held}{outcomes}{figures} |"
        )
    lines += [*figures_of(scores), "", f"{machine()}; `{command}`"]
    for score in scores:
        for case, cause in list(score.failures.items())[:SHOWN]:
            lines += ["", f"* `--case {score.name} {case}`: {cause.splitlines()[-1] if cause else ''}"]
        if len(score.failures) > SHOWN:
            lines += ["", f"* {len(score.failures) - SHOWN:,} more failures of {score.name}"]
    return "\n".join(lines) + "\n"


def summary(scores: list[Score]) -> str:
    """What was tried, in a line."""
    tried, failed = sum(sum(score.tried.values()) for score in scores), sum(len(score.failures) for score in scores)
    skipped = "".join(f"; left out: {score.name}, {score.skipped}" for score in scores if score.skipped)
    return f"{tried:,} trials of {sum(not score.skipped for score in scores)} attacks, {failed:,} failed{skipped}"


def figures_of(scores: list[Score]) -> list[str]:
    """A table of the figures that are called `kind: what`, a column per kind."""
    named = {tuple(name.split(": ", 1)): value for score in scores for name, value in score.figures.items()}
    found = {key: value for key, value in named.items() if len(key) == 2}
    kinds, rows = dict.fromkeys(key[0] for key in found), dict.fromkeys(key[1] for key in found)
    lines = ["", "| | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)] if found else []
    for row in rows:
        values = (found.get((kind, row)) for kind in kinds)
        cells = ("" if value is None else f"{value:,.{2 if value < 10 else 0}f}" for value in values)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=5.0, help="in all (default: 5)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--commits", type=int, default=100_000, help="of the long run (default: 100000)")
    made.add_argument("--segments", type=int, default=3000, help="of the bank that is opened with few descriptors")
    made.add_argument("--readers", type=int, default=20, help="processes beside a writer (default: 20)")
    made.add_argument("--only", nargs="+", metavar="ATTACK", help="these attacks: " + ", ".join(SHARES))
    made.add_argument("--case", nargs=2, metavar=("ATTACK", "CASE"), help="one case, as a failure names it")
    made.add_argument("--directory", type=Path, help="where banks are made, and removed again (default: /dev/shm)")
    made.add_argument("--out", type=Path, help="the table, Markdown")
    made.add_argument("--json", type=Path, help="everything, with all failures")
    args = made.parse_args(arguments)
    names = [args.case[0]] if args.case else args.only or list(SHARES)
    if unknown := sorted(set(names) - set(SHARES)):
        made.error(f"no such attack: {', '.join(unknown)}; there are {', '.join(SHARES)}")
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=args.directory or (shared if os.access(shared, os.W_OK) else None)))
    try:
        scores = run(args, names, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    command = "python benchmarks/torture_bank.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    text = table(scores, command.strip())
    print(text)
    print(summary(scores), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(text)
    if args.json is not None:
        found = {"machine": machine(), "command": command, "attacks": [vars(score) for score in scores]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(score.failures for score in scores))


def run(args: argparse.Namespace, names: list[str], place: Path) -> list[Score]:
    """Carry the attacks out, each for its share of what is left of the time."""
    try:
        shim = build(place)
    except Skipped:
        shim = None  # those who need it say why they are left out
    start_server(shim)
    seconds = 60 * args.minutes
    settings = Settings(args.seed, min(5.0, max(0.5, seconds / 20)), args.commits, args.segments, args.readers)
    attacks = attacks_of(settings, place)
    deadline, scores = time.monotonic() + seconds, []
    with tqdm(total=seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}") as bar:
        for at, name in enumerate(names):
            share = SHARES[name] / sum(SHARES[other] for other in names[at:])
            left = max(deadline - time.monotonic(), 0)
            scores.append(carry_out(attacks[name], place, share * left, bar, args.case[1] if args.case else None))
    return scores


if __name__ == "__main__":
    # Whoever ends it by a signal finds nothing left behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
