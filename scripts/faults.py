"""The faults of docs/reliability.md: carried out with the numbers stated there, and written into its table.

    python scripts/faults.py             all of them, one after the other: about an hour on two cores
    python scripts/faults.py 1 17 26     some; the others' figures in the table are those of the last time

Figures are kept in ``build/faults.json``. Ends with 1 where a pass line was missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.faults.checks import CHECKS, Place  # noqa: E402

KEPT, DOCS = REPOSITORY / "build" / "faults.json", REPOSITORY / "docs" / "reliability.md"
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


def table(kept: dict[str, dict[str, object]]) -> str:
    """All checks, and what was reached when each was last carried out."""
    lines = ["| | fault | pass line | reached | seconds |", "|--:|:--|:--|:--|--:|"]
    for number, check in CHECKS.items():
        told = kept.get(number, {"figure": "not carried out yet", "seconds": 0.0})
        lines.append(
            f"| {number} | {check.fault} | {check.pass_line} | {told['figure']} | {float(str(told['seconds'])):.0f} |"
        )
    return "\n".join(lines)


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
    for number in chosen:
        folder = Path(tempfile.mkdtemp(prefix="faults-", dir=given.folder))
        told = carry_out(number, folder)
        shutil.rmtree(folder, ignore_errors=True)
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        kept[number] = told
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1))
        check = CHECKS[number]
        print(f"{number:>4}  {check.fault}: {told['figure']}  ({told['seconds']:.0f} s)", flush=True)
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + table(kept) + "\n" + END + rest.split(END, 1)[1])
    return int(not all(kept[number]["passed"] for number in chosen))


if __name__ == "__main__":
    sys.exit(main())
