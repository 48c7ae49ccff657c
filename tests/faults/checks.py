"""The list: every fault with its pass line, and what carries it out in full (scripts/faults.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.faults import attacks, damage, kills, processes, steps
from tests.faults.zygote import Zygote
from tests.runs import REPOSITORY, environment


class Place:
    """Where a check works: a folder of its own, and a process that runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def zygote(self) -> Zygote:
        """Started when it is first asked for."""
        return Zygote()

    def close(self) -> None:
        """End what was started."""
        if "zygote" in self.__dict__:
            self.zygote.close()


@dataclass
class Check:
    """A line of the table."""

    fault: str
    pass_line: str
    carry_out: Callable[[Place], str]


CHECKS: dict[str, Check] = {}


def check(number: str, fault: str, pass_line: str) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
    """Add a function to the list; it gives the figure that was reached, and raises where that is not enough."""

    def add(function: Callable[[Place], str]) -> Callable[[Place], str]:
        CHECKS[number] = Check(fault, pass_line, function)
        return function

    return add


def covered(*names: str) -> str:
    """Tests of the default suite that show a line: run them, and say how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1500, check=False
    )
    match = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert match is not None
    files = sorted({f"`{name.split('::')[0]}`" for name in names})
    return f"{match.group(1)} tests pass ({', '.join(files)})"


# ---- crash and resume ------------------------------------------------------------------------------------------------

KILLED = "0 failed resumes, ≤ 1 step lost, SHA-256 of the last weights equal"


def _killed(variant: str) -> Callable[[Place], str]:
    def carry_out(place: Place) -> str:
        outcome = kills.kill_at_random(place.zygote, place.folder, variant, steps=200, kills=100)
        assert outcome.same, str(outcome)
        assert outcome.failed == 0, str(outcome)
        assert outcome.lost <= 1, str(outcome)
        return str(outcome)

    return carry_out


check("1a", "100 SIGKILLs at random in one run of 200 steps, float32", KILLED)(_killed("float32"))
check("1b", "the same, bfloat16 with Adam", KILLED)(_killed("bfloat16"))
check("1c", "the same, LoRA", KILLED)(_killed("LoRA"))
check("1d", "the same, one of two processes (gloo) each time", KILLED)(_killed("two processes"))


@check("2", "death before, in and after every write, flush and rename of a save", "100 % resumable")
def _(place: Place) -> str:
    points, died = processes.die_in_saves(place.zygote, place.folder)
    assert died >= points > 40, (died, points)
    return f"{died} of {died} deaths resumed by the same command, SHA-256 equal"


@check("3", "50 SIGKILLs while weights are perturbed (engine=in_place)", "bit-exact")
def _(place: Place) -> str:
    outcome = processes.die_in_queries(place.zygote, place.folder, kills=50)
    assert outcome.same, str(outcome)
    assert outcome.kills == 50, str(outcome)
    return str(outcome)


@check("4", "SIGTERM, SIGUSR1 in a step; in a step of a minute; a second signal", "snapshot, code 75, ≤ 5 s; at once")
def _(place: Place) -> str:
    exits = processes.signals(place.zygote, place.folder, [name for name in processes.SIGNALS if name != "SIGINT"])
    return "; ".join(f"{name}: code {code}, {seconds:.1f} s" for name, (code, seconds) in exits.items())


@check("5", "Ctrl-C in a step", "weights restored, code 130")
def _(place: Place) -> str:
    ((code, seconds),) = processes.signals(place.zygote, place.folder, ["SIGINT"]).values()
    return f"code {code}, {seconds:.1f} s, and goes on to an equal SHA-256"


@check("6", "a journal cut at each byte of its last record", "≤ 1 step lost")
def _(place: Place) -> str:
    cuts, lost = damage.cut_journal(place.folder, every=1)
    assert lost <= 1
    return f"{cuts} cuts, {lost} step lost, {cuts} resumes with equal SHA-256"


@check(
    "7", "a disk that is full at 20 sizes (tmpfs)", "one line with bytes wanted and free, old snapshot whole, 20 resume"
)
def _(place: Place) -> str:
    refused, resumed, mentions = processes.full_disks(place.zygote, place.folder, 20)
    assert refused == resumed == 20, (refused, resumed)
    return f"{refused} ended in one line ({mentions} with the bytes wanted), {resumed} went on with room, SHA-256 equal"


@check("8", "output_dir not writable, or taken away under the run", "refused before step 1; one line")
def _(place: Place) -> str:
    processes.folder_goes_away(place.zygote, place.folder)
    return "taken away: one line, code 2; not writable: " + covered(
        "tests/unit/run/test_folder.py::test_not_writable_is_refused"
    )


@check("9", "200 single flipped bits, over all files of a snapshot", "200 noticed, the snapshot before it used")
def _(place: Place) -> str:
    count = damage.flip_bits(damage.Damaged(place.folder / "run"), 200, resumes=20)
    return f"{count} noticed by the file's name; 20 of them resumed, SHA-256 equal"


@check("10", "100 truncated files of a snapshot", "100 noticed, the snapshot before it used")
def _(place: Place) -> str:
    count = damage.truncate(damage.Damaged(place.folder / "run"), 100, resumes=20)
    return f"{count} noticed by the file's name; 20 of them resumed, SHA-256 equal"


@check("11", "each file of a snapshot missing", "refused by name")
def _(place: Place) -> str:
    count = damage.remove(damage.Damaged(place.folder / "run"), resumes=100)
    return f"{count} of {count}, each resumed from the snapshot before"


@check(
    "12", "resumed with another seed, data, batch, eps, optimizer, model", "refused with what differs; others honoured"
)
def _(_: Place) -> str:
    return covered("tests/faults/test_damage.py::test_another_run_is_refused_with_what_differs",
                 "tests/faults/test_damage.py::test_budget_logging_and_learning_rate_may_change",
                 "tests/unit/run/test_folder.py")  # fmt: skip


@check("13", "two processes, one output_dir; a killed one's lock", "second refused; lock reclaimed")
def _(place: Place) -> str:
    processes.one_folder(place.zygote, place.folder)
    return "refused with the other's process number; reclaimed after SIGKILL"


@check("14a", "one of two processes hangs (trainer.ddp_timeout=40)", "the other leaves ≤ 60 s, not with 0")
def _(place: Place) -> str:
    code, seconds = processes.a_rank_hangs(place.zygote, place.folder, 40)
    assert seconds <= 60
    return f"code {code} after {seconds:.0f} s"


@check("14b", "killed on 2 processes, resumed on 1, 2, 4 (eps 0.1, float32)", "\\|Δg\\| ≤ 1e-6")
def _(place: Place) -> str:
    first, later = processes.ranks_agree(place.zygote, place.folder)
    assert first <= 1e-6, first
    return f"{first:.1e} in the first step measured anew, {later:.1e} at most in those after it"


@check("15", "what earlier releases have written", "loads, or is refused clearly")
def _(_: Place) -> str:
    return covered("tests/faults/test_releases.py")


# ---- numerics --------------------------------------------------------------------------------------------------------


@check("16", "learning rate 0 for 1000 steps in float32, bfloat16, float16", "0 weights changed")
def _(place: Place) -> str:
    for dtype in steps.DTYPES:
        steps.stand_still(place.folder / dtype, dtype, 1000)
    return "0 changed, SHA-256 equal; int8 and nf4 bases are not trained, and are not covered"


@check(
    "17", "NaN, ±Inf at L₊, L₋, both, one, all, clean × first, middle, last step", "untouched, counted, logged; abort"
)
def _(place: Place) -> str:
    cases = [(where, value, step) for where in steps.WHERE for value in steps.VALUES for step in (0, 1, 3)]
    for number, (where, value, step) in enumerate(cases):
        steps.bad_losses(place.folder / str(number), where, value, step)
    for number, value in enumerate(steps.VALUES):
        steps.bad_to_the_end(place.folder / f"end{number}", value)
    return f"{len(cases)} of {len(cases)}; 3 of 3 that stay end the run"


@check("18", "a quadratic: mean of 10⁴ estimates; 200 seeds", "within 3 standard errors of ∇L; falls for ≥ 95 %")
def _(_: Place) -> str:
    share = steps.downhill(200)
    assert share >= 0.95
    name = "test_the_mean_estimate_of_every_estimator_is_the_gradient"
    return f"falls for {100 * share:.0f} %; " + covered(f"tests/contract/test_estimates.py::{name}")


@check("19", "noise of tensors of one shape; any sharding", "\\|corr\\| < 0.01; the same bits")
def _(_: Place) -> str:
    return covered("tests/unit/noise/test_noise.py") + "; on a GPU: not covered here"


@check("20", "global random states; order of the data", "untouched by a step; independent of the estimator")
def _(_: Place) -> str:
    file = "tests/unit/trainer/test_trainer.py::"
    return covered(
        file + "test_global_random_states_are_left_alone", file + "test_the_order_of_the_rows_follows_the_seed_alone"
    )


@check("21", "out of memory at 20 random forwards; batch of 8", "loss equal within 1e-5, ≤ 3 retries")
def _(place: Place) -> str:
    apart, retries = steps.out_of_memory(place.folder, 20)
    assert apart <= 1e-5
    return f"losses within {apart:.1e}, {retries} retries at most"


@check("22", "a bit of one process's weights flips (hash every 10 steps)", "found within 10 steps")
def _(place: Place) -> str:
    return f"found after {processes.a_bit_flips(place.zygote, place.folder)} steps"


@check("23", "nothing trainable; eps below the dtype's resolution", "error before step 1")
def _(_: Place) -> str:
    file = "tests/unit/trainer/test_trainer.py::"
    return covered(
        file + "test_nothing_trainable_is_refused",
        file + "test_eps_below_bfloat16_is_refused",
        "tests/unit/weights/test_tensors.py::test_eps_below_the_dtype_is_refused_and_the_advice_works",
    )


@check("24", "10⁴ steps", "resident memory grows < 1 %; open files constant")
def _(place: Place) -> str:
    growth, before, after = processes.soak(place.zygote, place.folder, 10_000)
    assert growth < 0.01, growth
    assert before == after, (before, after)
    return f"{100 * growth:+.2f} % from step 1,000 to 10,000; {after} open files at both"


# ---- users and security ----------------------------------------------------------------------------------------------


@check("25", "200 mutated config keys", "200 refused, ≥ 95 % right suggestions, < 1 s, torch not loaded")
def _(_: Place) -> str:
    command = [sys.executable, "-m", "tests.faults.mutated", "200"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    share = report["meant"] / report["typos"]
    assert report["refused"] == 200, report
    assert share >= 0.95, report
    assert report["slowest"] < 1, report
    assert not report["torch"]
    return f"200 refused, {100 * share:.0f} % of {report['typos']} right, {report['slowest']:.2f} s at most, not loaded"


@check(
    "26", "hostile data files: bombs, lines of 1 GiB, depth, encodings, templates", "file:line message, bounded memory"
)
def _(_: Place) -> str:
    return covered("tests/unit/lm/data/test_files.py", "tests/unit/lm/data/test_encoding.py")


@check("27", "pickles in every loadable name, auto_map, _target_, header bombs", "0 executions")
def _(place: Place) -> str:
    planted, carried_out = attacks.pickles(place.folder / "pickles")
    carried_out += attacks.remote_code(place.folder / "remote")
    bombs = attacks.header_bombs(place.folder / "bombs")
    assert not carried_out
    keys = covered("tests/cli/test_cli_bad_input.py")
    return f"0 of {planted} pickles and of 2 remote modules; {bombs} header bombs refused; _target_: {keys}"


@check("28", "tokens in the environment", "in no file and no line of output")
def _(place: Place) -> str:
    return f"0 of {processes.secrets(place.zygote, place.folder)} files"


@check("29", "no network: offline hub, and a tracker whose server is gone", "run completes, one warning")
def _(place: Place) -> str:
    processes.dead_tracker(place.zygote, place.folder)
    return "completed, one note"


@check("30", "every README command, example and shipped YAML", "runs in the tests")
def _(_: Place) -> str:
    return covered("tests/cli/test_readme.py", "tests/cli/test_cli_help.py", "tests/cli/test_cli_catalogue.py")


# ---- what the field has met: 200 kills in all, and files of every kind -----------------------------------------------

COMBINED = "0 failed resumes, ≤ 1 step lost, SHA-256 of the reported weights equal"


def _combined(*variants: str) -> Callable[[Place], str]:
    def carry_out(place: Place) -> str:
        outcomes = []
        for number, variant in enumerate(variants):
            folder = place.folder / str(number)
            folder.mkdir(parents=True)
            outcomes.append(kills.kill_at_random(place.zygote, folder, variant, steps=60, kills=25))
            assert outcomes[-1].kills == 25, f"{variant}: the run was done after {outcomes[-1].kills} kills"
            assert outcomes[-1].same, f"{variant}: {outcomes[-1]}"
            assert outcomes[-1].failed == 0, f"{variant}: {outcomes[-1]}"
            assert outcomes[-1].lost <= 1, f"{variant}: {outcomes[-1]}"
        count, lost = sum(each.kills for each in outcomes), max(each.lost for each in outcomes)
        return f"{count} kills, 0 failed resumes, {lost} steps lost, SHA-256 equal"

    return carry_out


check("31a", "25 SIGKILLs at random in a run of 60 steps with guard=clip", COMBINED)(_combined("clip"))
check("31b", "the same, guard=rollback that goes back, best checkpoint at the end", COMBINED)(
    _combined("rollback, best")
)
check("32", "the same, best checkpoint at the end", COMBINED)(_combined("best"))
check("33", "the same, two data workers that outlive their process", COMBINED)(_combined("data workers"))
check("34a", "the same, one of two processes, zoft (a direction for each example)", COMBINED)(
    _combined("two processes, zoft")
)
check("34b", "the same, one of two processes, grzo, guard=clip", COMBINED)(_combined("two processes, grzo, clip"))
check("35a", "the same, guard=clip, best checkpoint and data workers together", COMBINED)(
    _combined("clip, best, data workers")
)
check("35b", "the same, mezo_svrg", COMBINED)(_combined("mezo_svrg"))


@check("36", "results of another state, run or damage beside the weights (16)", "measured anew, or of these weights")
def _(_: Place) -> str:
    return covered("tests/faults/test_fault_16_results.py")


@check(
    "37", "best checkpoints damaged, deleted, moved (19); rows that a batch leaves over (20)", "right, or a sentence"
)
def _(_: Place) -> str:
    return covered("tests/faults/test_fault_19_best.py", "tests/faults/test_fault_20_drop_last.py")


@check("38", "2 x 2 rows, 1 x 4, and from one to the other (21)", "apart by less than 10⁻³ of the step")
def _(_: Place) -> str:
    return covered("tests/invariant/test_fault_21_ranks.py")


@check("39", "a weight read outside its module by a later batch (22), in 13 ways", "losses within 10⁻⁶ at once")
def _(_: Place) -> str:
    return covered("tests/unit/engines/test_engines.py")


@check("40", "rows and frozen weights edited between a kill and a resume (23)", "refused, whichever row")
def _(_: Place) -> str:
    return covered("tests/faults/test_fault_23_data.py")


@check("41", "death in the first write, races, forks that outlive their process, links (24)", "claimed, or the reason")
def _(_: Place) -> str:
    return covered("tests/faults/test_fault_24_claims.py")


@check("42", "files of runs, checkpoints and models damaged and forged; bombs; steps too long (25)", "a sentence")
def _(_: Place) -> str:
    return covered("tests/faults/test_fault_25_files.py", "tests/faults/test_fault_25_steps.py")
