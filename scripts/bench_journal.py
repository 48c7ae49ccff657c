"""What journal and guard cost: their share of a step's time in one run of the demo, and the bytes they leave.

    python scripts/bench_journal.py                          # config=smoke, 400 queries, guard=clip
    python scripts/bench_journal.py --queries 200 key=value ...

The time inside each of their calls is added up, and divided by the wall time of the steps of the same run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def timed(kind: type, name: str, spent: dict[str, list[float]], key: str) -> None:
    """Let a method note how long each call takes."""
    call = getattr(kind, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent.setdefault(key, []).append(time.perf_counter() - began)

    setattr(kind, name, noted)


def main() -> None:
    """Run, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("overrides", nargs="*", help="as for zoft train")
    given = parser.parse_args()
    from zoft.config import compose
    from zoft.run.train import run
    from zoft.trainer.journaling import RunJournal
    from zoft.trainer.stepping import RunSteps

    spent: dict[str, list[float]] = {}
    for name in ("append", "digest"):
        timed(RunJournal, name, spent, "journal")
    timed(RunSteps, "_guarded", spent, "guard")
    folder = Path(tempfile.mkdtemp())
    few = [
        "task.num_train=64",
        "task.num_test=16",
        "task.num_dev=16",
        "trainer.eval_strategy='no'",
        "trainer.save_strategy='no'",
    ]
    words = ["config=smoke", f"budget.queries={given.queries}", *few, "+trainer.guard=clip"]
    try:
        facts = run(
            compose([*words, "trainer.load_best_model_at_end=false", *given.overrides, f"output_dir={folder / 'run'}"])
        )
        size = (folder / "run" / "journal.bin").stat().st_size
    finally:
        shutil.rmtree(folder)
    steps, seconds = facts["num_steps"], facts["seconds"]
    print(
        f"{steps} steps of {1e3 * seconds / steps:.1f} ms: {facts['model']}, {facts['num_trainable']:,} weights trained"
    )
    for key, calls in spent.items():
        share = sum(calls) / seconds
        print(f"{key:8} {1e3 * sum(calls) / steps:.3f} ms a step, {100 * share:.3f} % of its time")
    print(f"together {100 * sum(map(sum, spent.values())) / seconds:.3f} %; journal.bin {size:,} bytes once sealed")


if __name__ == "__main__":
    main()
