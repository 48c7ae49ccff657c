"""engine=onnx: torch's losses at every point, from one exported graph; runs resume, and what cannot be is refused."""

from __future__ import annotations

import importlib.util

import onnx
import pytest
import torch
from safetensors.torch import load_file

from tests import models, runs
from zoft.config import compose
from zoft.engines import _onnx_graph
from zoft.engines.in_place import InPlace
from zoft.engines.onnx import Onnx
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import logits_at
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.classes import Classes
from zoft.lm.objectives.options import Options
from zoft.noise.direction import Direction
from zoft.run.train import run
from zoft.subspaces.full import Full
from zoft.weights.elsewhere import runtime_of
from zoft.weights.tensors import Weights

LORA = ("peft=lora", "peft.r=2", "trainable=adapter", "optimizer.learning_rate=1e-2")
POINTS = [Point(Direction(1, 0, i), scale) for i in range(2) for scale in (1e-2, -1e-2)] + [Point()]


def batch(rows=3, length=9, seed=0):
    """Left-padded prompts with options of one token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, models.VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "option_tokens": torch.tensor([[5, 9]] * rows),
        "labels": torch.arange(rows) % 2,
    }


def options_of_some_tokens(seed=0):
    """Two rows an example, whose options have one and three tokens."""
    rows = {key: value for key, value in batch(4, 8, seed).items() if key in ("input_ids", "attention_mask")}
    more = {"option_len": torch.tensor([1, 3, 1, 3]), "num_options": torch.tensor([2] * 4)}
    return rows | more | {"labels": torch.tensor([1, 1, 0, 0])}


def sessions(engine, make):
    """The same adapter in torch and elsewhere."""
    for one in (InPlace(), engine):
        model = Lora(r=2).wrap(make(), seed=0)
        coordinates = Full().bind(Weights(model), "counter")
        yield one.bind(model, coordinates, lambda rows, model=model: Options().loss(model, rows))


@pytest.fixture(scope="module", params=["opt", "llama"])
def both(request):
    dropout = {"opt": {"dropout": 0.5}, "llama": {"attention_dropout": 0.5}}[request.param]  # off in a query
    return list(sessions(Onnx(), lambda: models.CAUSAL[request.param](num_hidden_layers=1, **dropout)))


@pytest.mark.parametrize("rows", [batch(), batch(1, 17, seed=1), options_of_some_tokens()], ids=["3x9", "1x17", "many"])
def test_losses_are_torchs(both, rows):
    here, exported = both
    losses = here.losses(rows, POINTS)
    assert losses.unique().numel() == len(POINTS)
    torch.testing.assert_close(exported.losses(rows, POINTS), losses, atol=1e-5, rtol=0)


def test_a_step_reaches_the_graph(both):
    here, exported = both
    before = [session.losses(batch(), [Point()]) for session in both]
    for session in (here, exported):
        name = next(name for name in session.weights.tensors if "lora_B" in name)
        session.apply_(name, 0, 8, torch.full((8,), 0.5))
    after = [session.losses(batch(), [Point()]) for session in both]
    assert abs(float(after[0] - before[0])) > 1e-4
    torch.testing.assert_close(after[1], after[0], atol=1e-5, rtol=0)


def test_examples_with_directions_of_their_own_are_torchs(both):
    here, exported = both
    examples = [batch(1, 9, seed=2), batch(1, 9, seed=3)]
    losses = here.losses_per_example(examples, POINTS[:2])
    torch.testing.assert_close(exported.losses_per_example(examples, POINTS[:2]), losses, atol=1e-5, rtol=0)


def test_frozen_matrices_in_few_bits_and_the_adapter_as_it_is(monkeypatch):
    """OPT's feed-forward layers come as Gemm, which the quantiser leaves alone: they are rewritten."""
    kinds = []
    make_session = _onnx_graph._session
    monkeypatch.setattr(_onnx_graph, "_session", lambda path: kinds.extend(op_types(path)) or make_session(path))
    wide = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 1}
    here, exported = sessions(Onnx(quantization="int4"), lambda: models.tiny_opt(**wide))
    exact, rounded = (session.losses(batch(), POINTS) for session in (here, exported))
    assert 1e-4 < float((exact - rounded).abs().max()) < 0.3
    assert kinds.count("MatMulNBits") == 7  # q, k, v, output, two of the feed-forward, the head
    assert "Gemm" not in kinds
    plus, minus, clean = rounded[0], rounded[1], rounded[-1]
    assert plus != minus
    assert abs(float(plus + minus - 2 * clean)) < 1e-3  # smooth in the adapter, as rounded tensors would not be


def op_types(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_what_a_graph_computes_is_compared_with_torch(monkeypatch):
    class Wrong:
        def __init__(self, *_):
            pass

        def __call__(self, adapter, inputs, places, tokens):
            return torch.zeros(tokens.shape)

        def plainly(self, *given):
            return self(*given) + 0.01

    monkeypatch.setattr(_onnx_graph, "OnnxGraph", Wrong)
    _, exported = sessions(Onnx(), models.tiny_llama)
    with pytest.raises(UserError, match=r"exported PeftModelForCausalLM gives .* off by 0.01: use engine=auto"):
        exported.losses(batch(), [Point()])


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def one_export(monkeypatch):
    """Runs of one base share a graph: an export takes seconds."""
    graphs, real = {}, _onnx_graph.OnnxGraph

    def of(model, names, inputs, bits=0):
        key = (tuple(inputs), bits)
        graphs.setdefault(key, None)
        graphs[key] = graphs[key] or real(model, names, inputs, bits)
        return graphs[key]

    monkeypatch.setattr(_onnx_graph, "OnnxGraph", of)
    return graphs


def words(folder, output_dir, *more):
    if not (folder / "model").exists():
        runs.model_folder(folder / "model", num_hidden_layers=1)
        runs.data_file(folder / "data.jsonl")
    return runs.arguments(folder, output_dir, *LORA, *more)


def test_a_run_is_torchs_and_goes_on_to_the_bit(tmp_path, one_export):
    torchs = run(compose(words(tmp_path, tmp_path / "torch", "engine=in_place")))
    whole = run(compose(words(tmp_path, tmp_path / "whole", "engine=onnx")))
    assert whole["engine"] == "onnx"
    assert whole["num_queries"] == torchs["num_queries"]
    of_torch, of_onnx = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("torch", "whole")
    )
    for name, tensor in of_torch.items():
        torch.testing.assert_close(of_onnx[name], tensor, atol=1e-4, rtol=0)
    assert any(tensor.any() for name, tensor in of_torch.items() if "lora_B" in name)
    cut = run(compose(words(tmp_path, tmp_path / "cut", "engine=onnx", "budget.queries=12")))
    assert cut["num_queries"] == 12
    longer = run(compose(words(tmp_path, tmp_path / "cut", "engine=onnx")))
    assert longer["weights_sha256"] == whole["weights_sha256"]
    assert len(one_export) == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["peft=none", "trainable=all"], "hands adapters .* use peft=lora trainable=adapter, or engine=auto"),
        (["peft=prefix"], "peft=prefix trainable=adapter trains something else"),
        (["trainable=norms_and_biases"], "trains weights of the base model, and only the adapter is saved"),
        (["method=nodes"], "engine=onnx perturbs weights"),
        (["estimator=forward_gradient"], "needs exact derivatives: choose engine=auto"),
        (["method=addax"], "needs a backward pass"),
        (["objective=metric", "objective.metric=f1"], "writes no text"),
        (["model.dtype=bfloat16"], "model.dtype=bfloat16 is about weights of this process"),
        (["engine.quantization=int3"], "engine.quantization must be null or one of int8, int4"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_sentence_before_anything_is_loaded(more, sentence, tmp_path):
    arguments = [*runs.arguments(tmp_path, tmp_path / "out", "peft=lora"), "engine=onnx"]
    with pytest.raises(UserError, match=sentence):
        compose([*arguments, *more])


def test_packages_that_are_not_there_are_named_before_the_data_is_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    cfg = compose([*runs.arguments(tmp_path, tmp_path / "out", *LORA), "engine=onnx"])
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"engine=onnx needs onnxscript: pip install 'zoft\[onnx\]'"):
        run(cfg)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_answered_for_is_not_called(both):
    _, exported = both
    assert runtime_of(exported.model) is exported
    with pytest.raises(UserError, match="forward runs elsewhere"):
        logits_at(exported.model, {"input_ids": batch()["input_ids"]}, Positions(torch.tensor([0]), torch.tensor([-1])))
    with pytest.raises(UserError, match="forward runs elsewhere"):
        Classes().predict(exported.model, batch())
