"""A hub that cannot be reached: one sentence within seconds, and what is cached goes on being served."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs
from zoft.errors import UserError
from zoft.lm import hub
from zoft.lm.data.files import read_rows
from zoft.lm.models.files import placed
from zoft.lm.models.load import load_model, load_tokenizer


@pytest.fixture(params=["refuses", "is silent"])
def unreachable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An endpoint that refuses connections, or accepts them and never answers; no switch is set."""
    from huggingface_hub import constants

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            listening.listen(64)
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        for name in hub._SWITCHES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_SECONDS", 0.3)
        hub._unanswered.cache_clear()
        yield endpoint
    hub._unanswered.cache_clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between the client's tries; none is to be made."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("asked", [placed, load_model, load_tokenizer])
def test_a_model_that_is_nowhere(asked: object, unreachable: str, waits: list[float]):
    with pytest.raises(UserError) as caught:
        asked("gpt2")  # type: ignore[operator]
    said = str(caught.value)
    assert said.startswith(f"model.name=gpt2 is not on this machine, and {unreachable} cannot be reached (")
    assert "give a folder with config.json and model.safetensors, or zoft:smollm2-135m-instruct" in said
    assert "\n" not in said
    assert not waits


def test_a_model_that_is_cached_in_part(unreachable: str, waits: list[float], tmp_path: Path):
    (tmp_path / "cache" / "models--gpt2" / "snapshots" / "abc").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.name=gpt2 is not on this machine, and .* cannot be reached"):
        load_tokenizer("gpt2")
    assert not waits


def test_a_data_set_that_is_nowhere(unreachable: str, waits: list[float]):
    with pytest.raises(UserError, match=r"the dataset nyu-mll/glue:sst2 is not on this machine, .* a local file"):
        list(read_rows("nyu-mll/glue:sst2"))
    assert not waits


def test_a_switch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub._unanswered.cache_clear()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or give a folder"):
        placed("gpt2")


def test_what_is_cached_is_served(unreachable: str, waits: list[float], tmp_path: Path):
    repository = tmp_path / "cache" / "models--owner--tiny"
    runs.model_folder(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load_model("owner/tiny").num_parameters()
    assert load_tokenizer("owner/tiny").pad_token == "<pad>"
    assert not waits


def test_the_hub_is_asked_once_and_the_switch_every_time(monkeypatch: pytest.MonkeyPatch):
    """What a session found out does not hide that the hub has been switched off meanwhile."""
    monkeypatch.setattr(hub, "_unanswered", lambda: "nothing answers")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert hub.out_of_reach() == "nothing answers"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.out_of_reach() == "HF_HUB_OFFLINE is set"
