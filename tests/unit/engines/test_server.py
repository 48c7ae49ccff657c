"""engine=server against a small server that speaks vLLM's protocol: equal losses, faults noticed, runs that go on."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import models, runs
from tests.serving import serving
from tests.unit.engines.test_onnx import LORA, POINTS, batch, options_of_some_tokens
from zoft.cli import main
from zoft.config import compose
from zoft.engines import _server_client
from zoft.engines.in_place import InPlace
from zoft.engines.server import Server
from zoft.errors import ServerLostError, UserError
from zoft.estimators.base import Point
from zoft.lm.models.generate import Answering, write
from zoft.lm.models.load import load_model
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.options import Options
from zoft.run.build import load
from zoft.run.train import run
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(_server_client, "_wait", lambda _seconds: None)


@pytest.fixture
def tiny():
    with serving(Lora(r=2).wrap(models.tiny_llama(), seed=0), tokenizer=runs.tiny_tokenizer()) as server:
        yield server


def session(engine, objective=None):
    model = Lora(r=2).wrap(models.tiny_llama(), seed=0)
    coordinates = Full().bind(Weights(model), "counter")
    objective = objective or Options()
    bound = engine.bind(model, coordinates, lambda rows: objective.loss(model, rows))
    for name, tensor in bound.weights.tensors.items():  # B is zero at the start
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return bound


@pytest.mark.parametrize("objective", [Options(), CrossEntropy()], ids=lambda o: o.name())
@pytest.mark.parametrize("rows", [batch(), options_of_some_tokens()], ids=["tokens", "many"])
def test_losses_are_torchs_at_every_point_with_few_slots(tiny, rows, objective):
    wanted = session(InPlace(), objective).losses(rows, POINTS)
    remote = session(Server(url=tiny.url, max_adapters=2), objective)
    torch.testing.assert_close(remote.losses(rows, POINTS), wanted, atol=1e-5, rtol=0)
    assert len(tiny.adapters) == 2
    assert len({body["model"] for body in tiny.completions}) == len(POINTS)  # no two of them share a name
    assert all("prompt_logprobs" not in body and body["max_tokens"] == 1 for body in tiny.completions)


def test_all_points_of_a_wave_are_one_batch_of_requests(tiny):
    remote = session(Server(url=tiny.url))
    remote.losses(batch(), POINTS)
    assert len(tiny.completions) == len(POINTS)  # an adapter each, all of its prompts together
    assert {len(body["prompt"]) for body in tiny.completions} == {3}


def test_a_step_reaches_the_server_in_spite_of_its_prefix_cache(tiny):
    here, remote = session(InPlace()), session(Server(url=tiny.url, max_adapters=1))
    for one in (here, remote):
        one.losses(batch(), [Point()])
        name = next(name for name in one.weights.tensors if "lora_B" in name)
        one.apply_(name, 0, 8, torch.full((8,), 0.5))
    torch.testing.assert_close(remote.losses(batch(), [Point()]), here.losses(batch(), [Point()]), atol=1e-5, rtol=0)


def test_an_adapter_that_is_there_is_not_loaded_again(tiny, monkeypatch):
    loads, load = [], tiny.load
    monkeypatch.setattr(tiny, "load", lambda name, path: loads.append(name) or load(name, path))
    remote = session(Server(url=tiny.url))
    for seed in range(3):
        remote.losses(batch(seed=seed), [Point()])
    assert len(loads) == 1  # vLLM reads what is loaded in place again before every step
    files = list(remote.backend.folder.rglob("adapter_model.safetensors"))
    assert len(files) == 1


@pytest.mark.parametrize("fault", ["down", "short", "other", "late", "misnamed", "restarted"])
def test_a_fault_is_noticed_and_asked_again(tiny, fault):
    remote = session(Server(url=tiny.url, timeout=2.0 if fault == "late" else 600.0))
    wanted = remote.losses(batch(), POINTS)
    tiny.faults.append(fault)
    num_asked = len(tiny.completions)
    assert torch.equal(remote.losses(batch(), POINTS), wanted)
    assert len(tiny.completions) > num_asked + len(POINTS)


def test_not_a_number_is_the_loss_that_it_is(tiny):
    """The trainer skips such a step, and ends the run where there are many in a row."""
    remote = session(Server(url=tiny.url))
    tiny.faults.append("nan")
    losses = remote.losses(batch(), POINTS)
    assert int(losses.isnan().sum()) == 1
    ((name, prompt),) = tiny.not_numbers
    asked = [body["prompt"] for body in tiny.completions if body["model"] == name]
    assert sorted(map(len, asked)) == [1, 2, 3]  # JSON has no such number, so the whole reply is an error
    assert [list(prompt)] in asked


def test_an_adapter_of_too_high_a_rank_is_one_sentence_and_no_lost_server(tiny):
    tiny.max_rank = 1
    with pytest.raises(UserError, match=r"greater than max_lora_rank 1.*start it with --max-lora-rank"):
        session(Server(url=tiny.url)).losses(batch(), POINTS)


def test_what_does_not_fit_into_the_servers_context_is_one_sentence(tiny):
    """vLLM cuts such a text, and says only that it has reached its length."""
    remote, answering = session(Server(url=tiny.url)), Answering(runs.tiny_tokenizer(), 6)
    tiny.context = 8
    write(remote.model, [[4, 5]], answering)
    with pytest.raises(UserError, match=r"3 tokens and 6 behind it do not fit into the 8 .*--max-model-len"):
        write(remote.model, [[4, 5, 6], [7, 8]], answering)
    with pytest.raises(UserError, match=r"9 tokens and 1 behind it .*task.max_length"):
        remote.losses(batch(), [Point()])


def test_a_load_whose_reply_came_too_late_is_no_refusal(tiny, monkeypatch):
    remote, ask = session(Server(url=tiny.url)), _server_client.Client.ask
    late = []

    def impatient(client, method, path, body=None):
        reply = ask(client, method, path, body)
        if "/load_lora" in path and not late:
            late.append(path)
            raise _server_client.BadReplyError("no reply within 1 s")
        return reply

    monkeypatch.setattr(_server_client.Client, "ask", impatient)
    wanted = session(InPlace()).losses(batch(), POINTS)
    torch.testing.assert_close(remote.losses(batch(), POINTS), wanted, atol=1e-5, rtol=0)
    assert late


def test_more_tokens_than_one_request_may_name_are_asked_in_several(monkeypatch):
    client, asked = _server_client.Client("http://127.0.0.1:1", retries=0, timeout=1.0), []

    def answer(_method, _path, body):
        asked.append(body["logprob_token_ids"])
        row = {f"token_id:{token}": -float(token) for token in body["logprob_token_ids"]}
        return 200, choices({"index": 0, "logprobs": {"top_logprobs": [row]}})

    monkeypatch.setattr(client, "ask", answer)
    assert client.scores("tiny", "salt", [[1]], list(range(300))) == [[-float(token) for token in range(300)]]
    assert max(map(len, asked)) <= 128


def test_a_server_that_is_gone_ends_the_run_after_a_few_tries(tiny):
    remote = session(Server(url=tiny.url, retries=2))
    before = {name: tensor.clone() for name, tensor in remote.weights.tensors.items()}
    tiny.faults += ["down"] * 99
    with pytest.raises(ServerLostError, match=r"did not score tokens in 3 tries: 500 EngineDeadError; .* goes on"):
        remote.losses(batch(), [Point()])
    assert len(tiny.completions) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in remote.weights.tensors.items())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_are_written_there(tiny, temperature):
    here, remote = session(InPlace()), session(Server(url=tiny.url))
    answering = Answering(runs.tiny_tokenizer(), 6, stop="yes")
    prompts = [[4, 5, 6], [7, 8]]
    texts = write(remote.model, prompts, answering, temperature=temperature, seed=3).texts
    again = write(remote.model, prompts[::-1], answering, temperature=temperature, seed=3).texts
    assert texts == again[::-1]  # a prompt's noise is its own
    if not temperature:
        assert texts == write(here.model, prompts, answering).texts


def test_a_text_that_was_cut_off_is_asked_again(tiny):
    remote, answering = session(Server(url=tiny.url)), Answering(runs.tiny_tokenizer(), 6)
    for temperature in (0.0, 0.7):
        wanted = write(remote.model, [[4, 5, 6], [7, 8]], answering, temperature=temperature).texts
        tiny.faults.append("cut")
        num_asked = len(tiny.completions)
        assert write(remote.model, [[4, 5, 6], [7, 8]], answering, temperature=temperature).texts == wanted
        assert len(tiny.completions) > num_asked + (2 if temperature else 1)


def test_files_and_adapters_go_with_the_session(tiny):
    remote = session(Server(url=tiny.url))
    remote.losses(batch(), POINTS)
    folder = remote.backend.folder
    assert folder.is_dir()
    assert tiny.adapters
    del remote
    gc.collect()
    assert not folder.exists()
    assert not tiny.adapters


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def of_runs(tmp_path):
    runs.arguments(tmp_path, tmp_path / "out")
    with serving(Lora(r=2).wrap(load_model(str(tmp_path / "model")), seed=0)) as server:
        yield server, partial(runs.arguments, tmp_path)


def test_a_run_is_torchs_stops_with_75_and_goes_on_to_the_bit(of_runs, tmp_path, capsys):
    server, arguments = of_runs
    words = [*LORA, "engine=server", f"engine.url={server.url}", "engine.retries=1"]
    torchs = run(compose(arguments(tmp_path / "torch", *LORA, "engine=in_place")))
    whole = run(compose(arguments(tmp_path / "whole", *words)))
    of_torch, of_server = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("torch", "whole"))
    assert of_torch.keys() == of_server.keys()
    for name, tensor in of_torch.items():
        torch.testing.assert_close(of_server[name], tensor, atol=1e-4, rtol=0)
    assert whole["final"] == torchs["final"]
    server.faults += [""] * 15 + ["down"] * 60  # in the middle of training
    assert main(["train", *arguments(tmp_path / "cut", *words)]) == 75
    assert "did not score tokens in 2 tries" in capsys.readouterr().err
    assert len((tmp_path / "cut" / "journal.bin").read_bytes()) > 0
    server.faults.clear()
    assert run(compose(arguments(tmp_path / "cut", *words)))["weights_sha256"] == whole["weights_sha256"]


def test_a_reward_of_texts_is_the_run_that_it_is_here(of_runs, tmp_path):
    """Texts of a step's points are written there together; each prompt's rewards against its own."""
    _, arguments = of_runs
    tokenizer = runs.tiny_tokenizer()
    words = [
        *LORA,
        "objective=reward",
        "objective.function=tests.unit.engines.test_server:vowels",
        "weighting=per_prompt",
    ]
    words += ["task.columns={prompt: text, reward: label}", "task.format=reward", "objective.max_new_tokens=3"]
    words += ["estimator.eps=0.3", "estimator.num_directions=2", "task.num_test=4"]

    def arguments_of(name, *more):
        given = arguments(tmp_path / name, *words, *more)
        return [word for word in given if not word.startswith(("task.template", "task.words"))]

    here = run(compose(arguments_of("here", "engine=in_place")))
    with serving(Lora(r=2).wrap(load_model(str(tmp_path / "model")), seed=0), tokenizer=tokenizer) as server:
        remote = run(compose(arguments_of("there", "engine=server", f"engine.url={server.url}")))
    assert remote["final"] == here["final"]
    of_here, of_there = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("here", "there"))
    for name, tensor in of_here.items():
        torch.testing.assert_close(of_there[name], tensor, atol=1e-4, rtol=0)
    before = load_file(tmp_path / "here" / "model" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in before.items() if "lora_B" in name)  # something was learnt


def vowels(prompts, generations):
    return [sum(letter in "aeiou" for letter in text) for text in generations]


def choices(*rows):
    return {"model": "tiny", "choices": list(rows)}


@pytest.mark.parametrize(
    "reply",
    [
        {"model": "tiny"},
        {"model": "tiny", "choices": None},
        choices("text"),
        choices({"logprobs": {"top_logprobs": [{"token_id:5": -1.0}]}}),  # no index
        choices({"index": "0"}),
        choices({"index": 0, "logprobs": {"top_logprobs": [{"token_id:5": "low"}]}, "token_ids": ["low"]}),
        choices({"index": 0, "logprobs": {"top_logprobs": [{"token_id:5": [1]}]}, "token_ids": [None]}),
        choices({"index": 0, "logprobs": {"top_logprobs": [[]]}, "token_ids": "5"}),
    ],
)
def test_a_reply_of_another_shape_is_a_bad_reply_and_no_traceback(monkeypatch, reply):
    client = _server_client.Client("http://127.0.0.1:1", retries=0, timeout=1.0)
    monkeypatch.setattr(client, "ask", lambda *_: (200, reply))
    with pytest.raises(_server_client.BadReplyError):
        client.scores("tiny", "salt", [[1, 2]], [5])
    settings = {"max_new_tokens": 1, "temperature": 0.0, "seed": 0, "stop": "", "ends": []}
    with pytest.raises(_server_client.BadReplyError):
        client.texts("tiny", "salt", [[1, 2]], settings)
    monkeypatch.setattr(client, "ask", lambda *_: (200, {"data": ["tiny"]}))
    with pytest.raises(_server_client.BadReplyError):
        client.cards()


def test_fault_13_an_adapter_on_a_base_that_is_served_names_its_revision_too(of_runs, tmp_path):
    server, arguments = of_runs
    cfg = compose(arguments(tmp_path / "out", *LORA, "engine=server", f"engine.url={server.url}"))
    cfg.model.revision = "v2"  # as of a name on the hub: this one is a folder, which has none
    model, *_ = load(cfg)
    assert model.peft_config["default"].revision == "v2"
    assert any(tensor.is_meta for tensor in model.parameters())


def test_a_check_and_an_estimate_of_time_load_no_base_either(of_runs, tmp_path, monkeypatch, capsys):
    server, arguments = of_runs
    words = arguments(tmp_path / "out", *LORA, "engine=server", f"engine.url={server.url}")
    monkeypatch.setattr("zoft.lm.models.load.load_model_as", None)  # the server has it
    assert main(["check", *words]) == 0
    capsys.readouterr()
    assert main(["estimate", *words, "--time", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert estimate["seconds"] > 0
    assert estimate["method"]["parts"].get("weights", 0) < 0.1  # MiB: of the adapter


def test_a_server_without_lora_is_refused_before_anything_is_read(tmp_path):
    with serving(Lora(r=2).wrap(models.tiny_llama(), seed=0), lora=False) as server:
        words = runs.arguments(tmp_path, tmp_path / "out", *LORA, "engine=server", f"engine.url={server.url}")
        cfg = compose(words)
        (tmp_path / "data.jsonl").unlink()
        with pytest.raises(UserError, match=r"serves no LoRA adapters.*--enable-lora"):
            run(cfg)
    with pytest.raises(UserError, match=r"nothing that can be used answers at .*scripts/serve_vllm.md"):
        run(cfg)  # and where none is left
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["peft=none", "trainable=all"], "engine=server hands adapters"),
        (["method=nodes"], "engine=server perturbs weights"),
        (["objective=label_words"], "reads a word at a mask"),
        (["model.quantization=nf4"], "with its own --quantization"),
        (["model.attn_implementation=eager"], "model.attn_implementation=eager is about weights of this process"),
        (["engine.url=localhost"], "engine.url must be http://host:port"),
        (["engine.max_adapters=0"], "engine.max_adapters must be at least 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_sentence(more, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("zoft.config.quantized.require_package", lambda name: None)
    with pytest.raises(UserError, match=sentence):
        compose([*runs.arguments(tmp_path, tmp_path / "out", "peft=lora"), "engine=server", *more])


def test_the_scripts_say_how_to_start_one():
    text = (Path(runs.REPOSITORY) / "scripts" / "serve_vllm.md").read_text()
    assert "--enable-lora" in text
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in text
