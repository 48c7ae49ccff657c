"""The faults of docs/reliability.md: carried out with the numbers stated there, and written into its table.

    python scripts/faults.py             all of them, one after the other: about two hours on two cores
    python scripts/faults.py 1 17 26     some; the others' figures in the table are those of the last time

Ends with 1 where a pass line was missed.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.faults.checks import CHECKS, Place  # noqa: E402

DOCS = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- begin: python scripts/faults.py -->", "<!-- end -->"


def carry_out(number: str, folder: Path) -> dict[str, object]:
    """One check: its line of the table."""
    check, place, began = CHECKS[number], Place(folder), time.perf_counter()
    try:
        figure, passed = check.carry_out(place), True
    except Exception as error:
        traceback.print_exc()
        figure, passed = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", False
    finally:
        place.close()
    return {"figure": figure, "passed": passed, "seconds": time.perf_counter() - began}


def reached(page: str) -> dict[str, tuple[str, str]]:
    """What the page says of each check: the figure and the seconds of the last time it was carried out.

    Example:
        >>> reached("| 5 | Ctrl-C in a step | code 130 | code 130, 0.5 s | 48 |")
        {'5': ('code 130, 0.5 s', '48')}
    """
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {cells[0]: (cells[3], cells[4]) for cells in rows if len(cells) == 5 and cells[0] in CHECKS}


def table(figures: dict[str, tuple[str, str]]) -> str:
    """All checks, what was reached when each was last carried out, and how many kills of combined runs that makes."""
    lines = ["| | fault | pass line | reached | seconds |", "|--:|:--|:--|:--|--:|"]
    for number, check in CHECKS.items():
        figure, seconds = figures.get(number, ("not carried out yet", "0"))
        lines.append(f"| {number} | {check.fault} | {check.pass_line} | {figure} | {seconds} |")
    return "\n".join([*lines, "", kills_in_all(figures)])


def kills_in_all(figures: dict[str, tuple[str, str]]) -> str:
    """The sum over the runs that were killed at random, single ones and those of guards, ranks and workers together."""
    killed = {number: re.match(r"(\d+) kills", figure) for number, (figure, _) in figures.items()}
    counts = {number: int(match.group(1)) for number, match in killed.items() if match}
    combined = sum(count for number, count in counts.items() if int(re.sub(r"\D", "", number)) >= 31)
    return f"{combined} kills in all in rows 31 to 35, {sum(counts.values())} with those of rows 1 and 3."


def main() -> int:
    """Carry out, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help=f"which: {', '.join(CHECKS)}; all where none is given"
    )
    parser.add_argument("--folder", default=None, help="where the runs are made (default: a temporary folder)")
    given = parser.parse_args()
    unknown = sorted(set(given.checks) - set(CHECKS))
    if unknown:
        parser.error(f"there is no check {', '.join(unknown)}: {', '.join(CHECKS)}")
    logging.getLogger("zoft").setLevel(logging.ERROR)
    chosen = given.checks or list(CHECKS)
    passed = True
    for number in chosen:
        folder = Path(tempfile.mkdtemp(prefix="faults-", dir=given.folder))
        outcome = carry_out(number, folder)
        shutil.rmtree(folder, ignore_errors=True)
        passed = passed and bool(outcome["passed"])
        before, rest = DOCS.read_text().split(BEGIN)
        page, after = rest.split(END, 1)
        figures = reached(page) | {number: (str(outcome["figure"]), f"{outcome['seconds']:.0f}")}
        DOCS.write_text(before + BEGIN + "\n" + table(figures) + "\n" + END + after)
        print(f"{number:>4}  {CHECKS[number].fault}: {outcome['figure']}  ({outcome['seconds']:.0f} s)", flush=True)
    print(kills_in_all(reached(DOCS.read_text())))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
