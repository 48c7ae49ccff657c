"""model.device_map: the same bits on the CPU, and one sentence for what no step would reach."""

import pytest
import torch

from tests import runs
from zoft.config import compose
from zoft.errors import UserError
from zoft.evaluation.evaluate import model_of
from zoft.lm.models.device_map import check_device_map, is_spread, on_device, placing_arguments, require_run_on
from zoft.lm.models.load import load_model, load_model_as
from zoft.run.train import run

MODULES = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.model_folder(tmp_path_factory.mktemp("spread") / "model").parent


@pytest.fixture(scope="module")
def plain(folder):
    runs.data_file(folder / "data.jsonl")
    return run(compose(runs.arguments(folder, folder / "plain")))


@pytest.mark.parametrize("given", ["cpu", "{" + ",".join(f"{name}:cpu" for name in MODULES) + "}"])
def test_the_bits_of_a_run_without(given, folder, plain, tmp_path):
    words = runs.arguments(folder, tmp_path / "out", f"model.device_map={given}")
    assert run(compose(words))["weights_sha256"] == plain["weights_sha256"]
    again = compose([f"config={tmp_path / 'out' / 'config.yaml'}", f"output_dir={tmp_path / 'again'}"])
    assert again.model.device_map == compose(words).model.device_map  # a mapping comes back from the run's file
    model = model_of(again, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"set trainer\.use_cpu=true"):
        require_run_on(model, torch.device("cuda"))


@pytest.mark.parametrize("given", [{"": "cpu"}, "auto", "balanced", None])
def test_from_python(given, folder):
    if torch.cuda.is_available() and isinstance(given, str):
        pytest.skip("on a GPU these put the model there")
    model = load_model_as("causal", str(folder / "model"), device_map=given)
    state = load_model(str(folder / "model")).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("best", r"^model.device_map must be auto, balanced, a device .*; got 'best'"),
        ([0, 1], "^model.device_map must be auto"),
        ({"": True}, "^model.device_map must be auto"),
        ({0: "cpu"}, "^model.device_map must be auto"),
        ({}, "^model.device_map is an empty mapping"),
        ("disk", "^model.device_map puts the model on disk.*engine=offload"),
        ({"": "cpu", "lm_head": "disk"}, "^model.device_map puts lm_head on disk.*engine=offload"),
        ({"lm_head": "meta"}, "^model.device_map puts lm_head on meta.*engine=offload"),
    ],
)
def test_bad_values(given, sentence):
    with pytest.raises(UserError, match=sentence):
        check_device_map(given)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.device_map=disk"], "engine=offload"),
        (["model.device_map=auto", "engine=offload"], "^model.device_map=auto says where weights are, and so does"),
        (
            ["model.device_map=auto", "engine=onnx", "method=mezo", "peft=lora", "trainable=adapter"],
            "and so does engine=onnx",
        ),
    ],
)
def test_a_config_is_refused_before_anything_is_loaded(words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        compose(["config=quickstart", "model.name=nowhere/at-all", f"output_dir={tmp_path / 'out'}", *words])


def test_what_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placing_arguments({"model": "1", "lm_head": "cpu"}) == {"device_map": {"model": 1, "lm_head": "cpu"}}
    with pytest.raises(UserError, match=r"puts lm_head on cuda:2, and this machine has 2 GPUs"):
        placing_arguments({"model": 0, "lm_head": "cuda:2"})
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        placing_arguments(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun has started several"):
        placing_arguments("auto")


def test_a_map_that_is_not_of_the_model(folder):
    with pytest.raises(UserError, match=r"^model.device_map names no device for model.embed_tokens.weight"):
        load_model(str(folder / "model"), device_map={"model.layers": "cpu"})
    with pytest.raises(UserError, match=r"^model.device_map names model.layer, .* Did you mean model.layers"):
        load_model(str(folder / "model"), device_map={"": "cpu", "model.layer": "cpu"})


def test_what_accelerate_leaves_on_meta_or_disk_is_refused(folder, monkeypatch):
    """Memory for a part of the model only: accelerate offloads the rest."""
    import transformers.integrations.accelerate as placing

    monkeypatch.setattr(placing, "get_max_memory", lambda *_: {"cpu": 20_000})
    with pytest.raises(UserError, match="engine=offload"):
        load_model(str(folder / "model"), device_map="auto")


def test_a_spread_model_stays_where_it_is():
    model = torch.nn.Linear(2, 2)
    model.hf_device_map = {"a": 0, "b": 1}
    assert is_spread(model)
    assert on_device(model, torch.device("meta")) is model
    assert not model.weight.is_meta
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(UserError, match=r"set trainer\.use_cpu=true"):
        on_device(model, torch.device("meta"))
