"""Compares the fingerprint of this tree with that of a commit, of a file, or of the committed record.

    python tests/invariant/fingerprint.py --base COMMIT          that commit's zoft against this tree's, bit by bit
    python tests/invariant/fingerprint.py --save FILE            keep this tree's rows
    python tests/invariant/fingerprint.py --against FILE         this tree's rows against kept ones
    python tests/invariant/fingerprint.py --write                into tests/assets/fingerprint.json, with the machine

Patterns narrow the rows: `'mezo *' 'minimize *'`. Rows are hashes of everything a run decides (fingerprint_rows.py).
The last bits of a matrix product depend on the processor, so rows that another machine made are compared by their
figures, within a tolerance. Exit code: 0 where all rows are equal, 1 where some differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "tests" / "assets" / "fingerprint.json"
ROWS = Path(__file__).with_name("fingerprint_rows.py")
MODES = ("never", "always")
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
"""How far figures may be from another machine's, relative to 1 and to themselves: bfloat16 has 8 bits."""

Rows = dict[str, dict[str, Any]]


def machine() -> str:
    """What the last bits depend on: the processor, the kernels that torch chooses for it, and versions."""
    import numpy
    import torch
    import transformers

    flags = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    kernels = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}"
    chosen = [f"{name}={os.environ[name]}" for name in ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR") if name in os.environ]
    return ", ".join([f"{platform.system()} {platform.machine()} {kernels} {flags}", versions, *chosen])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = dict(line.partition(":")[::2] for line in lines)
    return "".join(value for name, value in sorted(named.items()) if name.split(" ")[0].strip() in ("model", "flags"))


# ------------------------------------------------------------------------------------------------------------- a record


def rows_of(tree: Path, mode: str, patterns: Iterable[str]) -> Rows:
    """The rows of a tree, made in a process of its own.

    Args:
        tree: the folder that holds ``zoft/`` and ``configs/``; the script and the tiny models are this tree's.
        mode: ``ZOFT_COMPILE``.
        patterns: of rows' names; none is all.
    """
    given = {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "ZOFT_COMPILE": mode, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(ROWS), str(tree), *patterns]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            command, cwd=folder, env=os.environ | given, stdout=subprocess.PIPE, stderr=said, text=True, check=False
        )
        if process.returncode:
            said.seek(0)
            sys.exit(f"the rows of {tree} could not be made:\n{said.read()[-2000:]}")
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    return {f"{row.pop('name')}, compile {mode}": row for row in rows}


def record(trees: list[Path], modes: Iterable[str], patterns: list[str], jobs: int) -> list[Rows]:
    """The rows of each tree in each mode, some processes side by side."""
    tasks = [(tree, mode) for mode in modes for tree in trees]
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda task: rows_of(*task, patterns), tasks))
    rows: list[Rows] = [{} for _ in trees]
    for (tree, _), part in zip(tasks, parts, strict=True):
        rows[trees.index(tree)] |= part
    return rows


# ------------------------------------------------------------------------------------------------------------ comparing


def differences(before: Rows, now: Rows) -> Iterator[str]:
    """One line for each row that differs or is gone; rows that are new are none.

    Args:
        before: rows of the past; one of another machine is compared by its figures, within :data:`TOLERANCE`.
        now: rows of this tree.
    """
    here = machine()
    for name, old in before.items():
        new, exactly = now.get(name), old.get("machine", here) == here
        if new is None:
            yield f"{name}: is gone"
        elif exactly and old["sha"] != new["sha"]:
            yield f"{name}: {old['sha']} became {new['sha']}{_first_figures(old, new)}"
        elif not exactly and not _near(name, old, new):
            yield f"{name}: further off than another machine explains{_first_figures(old, new)}"
    for name, new in now.items():
        if name not in before and new["sha"].startswith("failed"):
            yield f"{name}: {new['sha']}"


def _near(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    bound = TOLERANCE["bf16" if " bf16 " in name else "fp32"]
    close = lambda a, b: math.isclose(a, b, rel_tol=bound, abs_tol=bound) or (a != a and b != b)  # noqa: E731
    words = [row["sha"] if " " in row["sha"] else "" for row in (old, new)]  # "refused UserError" is no hash
    if words[0] != words[1] or old["exact"] != new["exact"] or old["near"].keys() != new["near"].keys():
        return False
    return all(
        len(a) == len(new["near"][key]) and all(map(close, a, new["near"][key])) for key, a in old["near"].items()
    )


def _first_figures(old: dict[str, Any], new: dict[str, Any]) -> str:
    for part in ("exact", "near"):
        for key, value in old[part].items():
            if new[part].get(key) != value:
                return f" ({key} {value} became {new[part].get(key)})"
    return " (figures equal to six digits)" if old["near"] else ""


# ------------------------------------------------------------------------------------------------------------- the file


def kept(path: Path) -> Rows:
    """The rows of a file, each with the ``machine`` that made it."""
    file = json.loads(path.read_text())
    return {name: {"machine": file["machine"]} | row for name, row in file["rows"].items()}


def keep(path: Path, rows: Rows) -> None:
    """Write them, a row a line; the machine of most stands at the head, another one with its row."""
    here = machine()
    makers = [row.get("machine", here) for row in rows.values()]
    head = max(makers, key=makers.count)
    lines = []
    for name, row in rows.items():
        maker = row.get("machine", here)
        plain = {key: value for key, value in row.items() if key != "machine"}
        lines.append(f"  {json.dumps(name)}: {json.dumps(plain if maker == head else plain | {'machine': maker})}")
    text = ",\n".join(lines)
    path.write_text(f'{{\n "machine": {json.dumps(head)},\n "rows": {{\n{text}\n }}\n}}\n')


def tree_of(commit: str, folder: Path) -> Path:
    """zoft and its configs as they were at a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit, "zoft", "configs"]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        sys.exit(f"{commit} is no commit of this repository: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def _is_meant(name: str, patterns: list[str], modes: list[str]) -> bool:
    run, mode = name.split(", compile ")
    return mode in modes and (not patterns or any(fnmatch(run, pattern) for pattern in patterns))


def main() -> int:
    """The command; see the first lines of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="names of rows, with * for anything; all of them without")
    parser.add_argument("--base", metavar="COMMIT", help="compare with zoft as it was then")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with kept rows")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep this tree's rows")
    parser.add_argument("--write", action="store_true", help=f"keep them in {ASSET.relative_to(ROOT)}")
    parser.add_argument("--compile", choices=MODES, action="append", help="ZOFT_COMPILE; both without")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    given = parser.parse_args()
    modes = ["never"] if given.write else given.compile or list(MODES)
    if given.against is None and given.base is None and given.save is None and not given.write:
        given.against = ASSET
    if given.against and not given.compile:  # the modes that the file has
        modes = [mode for mode in MODES if any(name.endswith(mode) for name in kept(given.against))]
    with tempfile.TemporaryDirectory() as folder:
        trees = [ROOT, *([tree_of(given.base, Path(folder))] if given.base else [])]
        now, *others = record(trees, modes, given.patterns, given.jobs)
    if not now:
        sys.exit(f"no row is called {' or '.join(given.patterns)}")
    if given.save:
        keep(given.save, now)
    if given.write:
        keep(ASSET, (kept(ASSET) if given.patterns else {}) | now)
    before = now
    if given.base:
        (before,) = others
    elif given.against:
        before = {name: row for name, row in kept(given.against).items() if _is_meant(name, given.patterns, modes)}
    changes = list(differences(before, now))
    num_others = sum(row.get("machine", machine()) != machine() for row in before.values())
    near = f", {num_others} of them near: another machine made those" if num_others else ""
    print("\n".join(changes) or f"{len(before)} rows equal{near}")
    if len(set(now) - set(before)):
        print(f"{len(set(now) - set(before))} rows are new")
    return int(bool(changes))


if __name__ == "__main__":
    sys.exit(main())
