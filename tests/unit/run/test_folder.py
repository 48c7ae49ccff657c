"""A run's folder: claimed, resumed, shown, refused; never overwritten."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment
from zoft.config import resolved_yaml
from zoft.errors import UserError
from zoft.run import folder


def listing(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def finish(path: Path) -> None:
    for name in ("final.json", "report.json"):
        (path / name).write_text('{"weights_sha256": "ab"}')


def test_the_states_of_a_run(tmp_path: Path):
    place = tmp_path / "runs" / "a"
    assert folder.claim(str(place), "seed: 0\n") == "new"
    assert listing(place) == [".lock", "config.yaml"]
    folder.unlock(str(place))
    assert listing(place) == ["config.yaml"]
    assert (place / "config.yaml").read_text() == "seed: 0\n"
    assert folder.claim(str(place), "seed: 0\n") == "resume"
    folder.unlock(str(place))
    finish(place)
    assert folder.claim(str(place), "seed: 0\n") == "done"
    assert listing(place) == ["config.yaml", "final.json", "report.json"]


def test_every_key_that_the_docs_let_change_may_change():
    page = (Path(__file__).resolve().parents[3] / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.split("## What may change when a run is resumed")[1].split("\n\n|")[1].split("\n\n")[0]
    keys = {key for row in table.splitlines() for key in re.findall(r"`([\w.*]+)`", row.strip("|").split("|")[0])}
    keys -= {"dataloader_drop_last"}  # what is excepted
    assert {"trainer.parallel", "trainer.guard*"} <= keys
    names = {key: key.replace("_*", "_steps").replace(".*", ".name").replace("*", "_steps") for key in keys}
    assert [key for key, name in names.items() if not folder.CHANGEABLE.fullmatch(name)] == []
    assert not folder.CHANGEABLE.fullmatch("trainer.dataloader_drop_last")


def test_an_empty_folder_is_new(tmp_path: Path):
    assert folder.claim(str(tmp_path), "seed: 0\n") == "new"


@pytest.mark.parametrize("name", [".hydra", "multirun.yaml", ".submitit"])
def test_what_hydra_leaves_is_not_content(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    assert folder.claim(str(tmp_path), "seed: 0\n") == "new"


def test_another_run_is_refused_with_the_lines_that_differ(tmp_path: Path):
    folder.claim(str(tmp_path), "a: 1\nseed: 0\nz: 1\n")
    folder.unlock(str(tmp_path))
    with pytest.raises(UserError) as caught:
        folder.claim(str(tmp_path), "a: 1\nseed: 1\nz: 1\n")
    message = str(caught.value)
    assert "holds another run" in message
    assert "-seed: 0" in message
    assert "+seed: 1" in message
    assert "a: 1" not in message
    assert "choose another output_dir" in message
    assert (tmp_path / "config.yaml").read_text() == "a: 1\nseed: 0\nz: 1\n"


def test_foreign_content_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty and holds no run of zoft \(thesis\.tex\)"):
        folder.claim(str(tmp_path), "seed: 0\n")
    assert listing(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: give a folder"):
        folder.claim(str(tmp_path / "file"), "seed: 0\n")
    assert (tmp_path / "file").read_text() == "mine"


def test_not_writable_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is not writable \(.+\): choose another folder"):
        folder.claim(str(tmp_path / "file" / "below"), "seed: 0\n")
    with pytest.raises(UserError, match="is not writable"):
        folder.claim("/proc/zoft", "seed: 0\n")  # refuses even root


def claim_and_release(output_dir: str) -> None:
    parent = folder.nearest(output_dir)
    folder.claim(output_dir, "seed: 0\n")
    folder.release(output_dir, parent)


def test_release_takes_back_what_the_claim_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a", "runs/deep/a", "./b", str(tmp_path / "c" / "d")):
        claim_and_release(place)
        assert not listing(tmp_path), place


def test_release_leaves_folders_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    claim_and_release("mine/runs/a")
    claim_and_release("mine/runs")
    claim_and_release(str(tmp_path / "mine" / "runs" / "b" / "c"))
    assert listing(tmp_path) == ["mine", "mine/runs"]


def test_release_leaves_a_run_that_has_begun(tmp_path: Path):
    parent = folder.nearest(str(tmp_path / "a"))
    folder.claim(str(tmp_path / "a"), "seed: 0\n")
    (tmp_path / "a" / "metrics.csv").write_text("x")
    folder.release(str(tmp_path / "a"), parent)
    folder.release(str(tmp_path / "nothing"), parent)
    folder.unlock(str(tmp_path / "a"))
    assert listing(tmp_path) == ["a", "a/config.yaml", "a/metrics.csv"]


# ---- one process at a time -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from zoft.run import folder
folder.claim(sys.argv[1], "seed: 0\\n")
print("held", flush=True)
time.sleep(100)
"""


def other_process(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(place)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_and_free_again_when_its_process_is_dead(tmp_path: Path):
    place = tmp_path / "a"
    process = other_process(place)
    with pytest.raises(UserError, match=rf"is in use by process {process.pid} on \S+: wait until it ends"):
        folder.claim(str(place), "seed: 0\n")
    assert listing(place) == [".lock", "config.yaml"]
    process.kill()
    process.communicate()
    assert listing(place) == [".lock", "config.yaml"]  # a killed process tidies nothing up
    assert folder.claim(str(place), "seed: 0\n") == "resume"
    assert (place / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    folder.unlock(str(place))
    assert listing(place) == ["config.yaml"]


def test_a_lock_alone_is_no_content(tmp_path: Path):
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    assert folder.claim(str(tmp_path), "seed: 0\n") == "new"
    folder.unlock(str(tmp_path))


def test_a_finished_folder_is_never_locked(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    finish(tmp_path)
    assert folder.claim(str(tmp_path), "seed: 0\n") == "done"
    assert listing(tmp_path) == ["config.yaml", "final.json", "report.json"]


def test_a_refused_claim_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_atomically", write)
    with pytest.raises(UserError, match="No space left"):
        folder.claim(str(tmp_path), "seed: 0\n")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["./b", "/elsewhere/b", "a name with spaces " * 9])
def test_a_run_is_the_same_whatever_its_folder_is_called(name: str, tmp_path: Path):
    from omegaconf import OmegaConf

    earlier, now = (OmegaConf.to_yaml({"a": 1, "output_dir": place, "seed": 0}) for place in ("a", name))
    (tmp_path / "config.yaml").write_text(earlier)
    assert folder.claim(str(tmp_path), now) == "resume"
    folder.unlock(str(tmp_path))
    with pytest.raises(UserError, match="holds another run") as caught:
        folder.claim(str(tmp_path), now.replace("seed: 0", "seed: 1"))
    assert "output_dir:" not in str(caught.value)


def test_a_finished_run_is_not_shown_for_settings_with_which_it_would_have_ended_elsewhere(tmp_path: Path):
    config = "optimizer:\n  learning_rate: {}\ntrainer:\n  per_device_train_batch_size: {}\n  " + (
        "gradient_accumulation_steps: {}\n  logging_steps: {}\nbudget:\n  queries: {}\n"
    )
    place = str(tmp_path / "a")
    folder.claim(place, config.format(0.1, 8, 1, 10, 40))
    folder.unlock(place)
    finish(tmp_path / "a")
    for now in ((0.1, 8, 1, 5, 40), (0.1, 4, 2, 10, 40), (0.1, 8, 1, 10, 30)):
        assert folder.claim(place, config.format(*now)) == "done"
    with pytest.raises(UserError, match=r"finished with other settings or rows:\n  -  learning_rate: 0\.1\n  \+  le"):
        folder.claim(place, config.format(3.0, 8, 1, 10, 40))
    with pytest.raises(UserError, match=r"rows of a step: 8\n  \+  rows of a step: 4\nchoose another output_dir"):
        folder.claim(place, config.format(0.1, 4, 1, 10, 40))
    assert folder.claim(place, config.format(3.0, 8, 1, 10, 60)) == "resume"
    folder.unlock(place)


def test_a_finished_run_is_not_shown_for_other_rows_in_its_file(tmp_path: Path):
    rows, place = tmp_path / "rows.jsonl", str(tmp_path / "a")
    words = ["task=custom", f"task.train={rows}", "task.template='{text} is'", "task.words={a: b, c: d}"]
    rows.write_text('{"text": "x", "label": "a"}\n')
    before = resolved_yaml(words)
    assert folder.claim(place, before) == "new"
    folder.unlock(place)
    finish(tmp_path / "a")
    assert folder.claim(place, resolved_yaml(words)) == "done"
    rows.write_text('{"text": "x", "label": "c"}\n')
    with pytest.raises(UserError, match=r"other settings or rows:\n  -# task.train: .*rows.jsonl has"):
        folder.claim(place, resolved_yaml(words))
    earlier = "".join(line for line in before.splitlines(keepends=True) if not line.startswith("# task."))
    (tmp_path / "a" / "config.yaml").write_text(earlier)  # as runs were written before
    assert folder.claim(place, resolved_yaml(words)) == "done"
    (tmp_path / "a" / "config.yaml").write_text(before)
    (tmp_path / "a" / "report.json").unlink()
    assert folder.claim(place, resolved_yaml(words)) == "resume"  # its journal knows which row differs
    folder.unlock(place)
