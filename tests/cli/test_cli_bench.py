"""`zoft bench` on the command line: help, the shipped plan, a mistake in one sentence, a bench in a process."""

import re

from tests import runs


def test_the_shipped_bench_is_shown(tmp_path):
    done = runs.zoft("bench", "config=demo", "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tasks       sms_spam, rotten_tomatoes, trec" in done.stdout
    assert "cells       564 of 240 queries" in done.stdout
    assert (
        "task=sms_spam task.prompt=aligned method=zoft seed=0 budget.queries=240 optimizer.learning_rate=1"
        in done.stdout
    )
    assert not list(tmp_path.iterdir())


def test_a_bench_from_an_experiment_on_the_command_line(tmp_path):
    unused = ("output_dir", "budget", "method", "optimizer", "trainer.eval", "trainer.save", "trainer.logging")
    base = [word for word in runs.arguments(tmp_path, "unused") if not word.startswith(unused)]
    config = tmp_path / "mine.yaml"
    config.write_text("# @package _global_\ndefaults:\n  - override /trainable: all\nbudget: {queries: 8}\n")
    words = [f"config={config}", *base, "methods={mezo: 1e-2}", "references=[zero_shot]", "seeds=[0]", "rates=[1]"]
    done = runs.zoft("bench", *words, "evaluations=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2/4  custom/aligned/mezo-x1-seed0" in done.stdout
    assert re.search(r"\(\d+ s; about \d\d:\d\d left\)", done.stdout), "how long is left is said from the first run on"
    assert (tmp_path / "runs" / "bench-mine" / "bench.md").read_text() in done.stdout
    assert not done.stderr
    plan = runs.zoft("bench", *words, "--plan", "--time", cwd=tmp_path)
    assert re.search(r"\ntime +about \d\d:\d\d to train 2 cells with jobs=1, by three steps", plan.stdout), plan.stderr
    alone = runs.zoft("bench", *words, "--time", cwd=tmp_path)
    assert (alone.returncode, "--time goes with --plan" in alone.stderr) == (2, True)
    others = [word for word in words if not word.startswith("methods=")]
    wrong = runs.zoft("bench", *others, "methods=[mezzo]", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("zoft: error: there is no method called 'mezzo'. Did you mean mezo")
    assert len(wrong.stderr.splitlines()) == 1
