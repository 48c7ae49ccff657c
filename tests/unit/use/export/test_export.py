"""Exports load with plain transformers, peft and gguf from another folder, and compute what the run's model does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli_start import ROWS
from tests.models import tiny_llama
from tests.runs import arguments, environment
from zoft.cli import main
from zoft.config import compose
from zoft.evaluation.evaluate import model_of
from zoft.lm.models.names import portable_name
from zoft.run.train import run
from zoft.use.export import push as pushing
from zoft.use.inference.load import config_of

IDS = [[5, 6, 7, 8, 9, 10, 11]]


def pairs_tokenizer() -> Any:
    """Byte-level pairs, learnt from a few words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["you call no yes Label is it free"] * 4, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of a model in a folder next to them: one of its own weights, one of an adapter."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = pairs_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 600}
    tiny_llama(**sizes).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["classify"]))
    given = [f"task.train={root / 'rows.jsonl'}", f"model.name={root / 'base'}", "budget.queries=10"]
    for name, more in (("whole", ["trainable=all"]), ("adapter", ["peft=lora"])):
        words = ["config=classify", *given, "optimizer.learning_rate=1e-2", *more, f"output_dir={root / name}"]
        run(compose(words))
    return root


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.float()


def in_another_process(codes: list[str], cwd: Path) -> Any:
    """What plain libraries compute in a folder that knows nothing of zoft, by each of some lines of code."""
    each = "\n".join(f"{code}\ntold.append(out.flatten().tolist())" for code in codes)
    program = f"import json, torch\nIDS, told = {IDS!r}, []\n{each}\nprint(json.dumps(told))"
    environment_ = environment() | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment_, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PLAIN = """
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
out = model.eval()(input_ids=torch.tensor(IDS)).logits.detach()
"""
ADAPTER = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
out = model.eval()(input_ids=torch.tensor(IDS)).logits.detach()
"""


def exported(capsys: Any, run_dir: Path, output: Path, *flags: str) -> Path:
    assert main(["export", f"run={run_dir}", f"output={output}", *flags]) == 0, capsys.readouterr().err
    capsys.readouterr()
    return output


def test_an_export_loads_elsewhere_and_computes_the_same(runs: Path, tmp_path: Path, capsys: Any):
    import torch

    cases = [("whole", [], PLAIN), ("adapter", [], ADAPTER), ("adapter", ["--merge"], PLAIN)]
    codes = [
        code.format(folder=str(exported(capsys, runs / name, tmp_path / f"export{number}", *flags)))
        for number, (name, flags, code) in enumerate(cases)
    ]
    (tmp_path / "elsewhere").mkdir()
    for (name, *_), out in zip(cases, in_another_process(codes, tmp_path / "elsewhere"), strict=True):
        expected = logits(model_of(config_of(str(runs / name), []), str(runs / name)))
        torch.testing.assert_close(torch.tensor(out), expected.flatten(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            expected, logits(model_of(config_of(str(runs / name), ["peft=none", "trainable=all"]), "")), atol=1e-4
        )


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 1e-3), ("q8_0", 5e-2), ("q4_0", 1.0)])
def test_a_gguf_file_is_read_by_others(kind: str, tolerance: float, runs: Path, tmp_path: Path, capsys: Any):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    folder = exported(capsys, runs / "adapter", tmp_path / "export", "--gguf", "--quantize", kind)
    (file,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert [bytes(tokens.parts[i]).decode() for i in tokens.data[:3]] == ["<s>", "<pad>", "</s>"]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    cfg = config_of(str(runs / "adapter"), [])
    # of the length of all logits: training may have made them ten times as large as they were
    expected = logits(model_of(cfg, str(runs / "adapter")))
    off = float((logits(model) - expected).norm() / expected.norm())
    assert off < tolerance, off
    assert f"llama-cli -m {file.name}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("flags", [(), ("--gguf",)])
def test_an_export_that_fails_leaves_nothing(flags: tuple[str, ...], runs: Path, tmp_path: Path, monkeypatch: Any):
    def write(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    words = ["export", f"run={runs / 'whole'}", "output=.", *flags]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(f"zoft.use.export.{'gguf_file' if flags else 'folder'}.write_card", write)
        assert main(words) == 2
    assert not any(tmp_path.iterdir())
    assert main(words) == 0
    assert (tmp_path / "README.md").is_file()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_the_card_says_what_was_done(runs: Path, tmp_path: Path, capsys: Any):
    from huggingface_hub import ModelCard

    folder = exported(capsys, runs / "adapter", tmp_path / "export")
    card = ModelCard.load(folder / "README.md")
    facts = json.loads((runs / "adapter" / "report.json").read_text())
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder of this machine is no name on the hub
    assert f"**Warning.** The base model is a folder of the machine it was trained on (`{runs / 'base'}`)" in card.text
    for name in ("estimator", "optimizer", "learning_rate", "batch_size", "response", "seed"):
        assert f"| {name} | {facts[name]} |" in card.text, name
    assert "| eps |" not in card.text  # no probe was made
    for part in (facts["weights_sha256"], "queries | 10", "95 %", "transformers", facts["command"], "rows.jsonl"):
        assert part in card.text
    assert "'beta': 0.9, 'decay': 0.95, 'window': 10, 'ridge': 1.0, 'cooling': 8.0, 'trust'" in card.text
    assert "| template | {text}\\nLabel: |" in card.text
    assert "| words | 'no': 'no', 'yes': 'yes' |" in card.text
    low, high = (100 * end for end in facts["gain_interval"])
    assert f"accuracy, difference | {100 * facts['gain']:+.1f} [{low:+.1f}, {high:+.1f}] on the same rows" in card.text


def test_the_card_of_whole_weights_asks_for_no_base(runs: Path, tmp_path: Path, capsys: Any):
    cases = [("whole", []), ("adapter", ["--merge"]), ("adapter", ["--gguf"])]
    for number, (name, flags) in enumerate(cases):
        card = (exported(capsys, runs / name, tmp_path / f"export{number}", *flags) / "README.md").read_text()
        assert "this adapter" not in card
        assert "--merge" not in card


def test_the_card_of_the_demos_model_says_so(tmp_path: Path):
    from zoft.use.export.card import write_card

    facts = {"model": "zoft:smollm2-135m-instruct", "metric": "accuracy"}
    for kind in ("adapter", "model"):
        (tmp_path / kind).mkdir()
        card = write_card(tmp_path / kind, facts, kind=kind, head="causal", name="me/mine").read_text()
        assert "the copy of `HuggingFaceTB/SmolLM2-135M-Instruct`" in card
        assert ("`--merge` exports the weights it was measured with" in card) is (kind == "adapter")


def test_the_report_names_method_rates_and_batch(runs: Path):
    facts = json.loads((runs / "adapter" / "report.json").read_text())
    assert (facts["estimator"], facts["optimizer"], facts["objective"]) == ("nodes", "whiten", "options")
    assert (facts["learning_rate"], facts["batch_size"], facts["response"]) == (0.01, 16, "identity")
    assert facts.keys().isdisjoint(("law", "eps", "num_directions"))  # nothing was drawn
    assert (facts["peft"], facts["trainable"], facts["engine"]) == ("lora", "adapter", "nodes")
    assert (facts["optimizer_settings"]["window"], facts["template"]) == (10, "{text}\nLabel:")


def test_the_report_says_what_trainable_settled_to(runs: Path, tmp_path: Path):
    settled = {"last_blocks": ["method=zoft"], "all": ["method=mezo"], "adapter": ["method=mezo", "peft=lora"]}
    for trained, words in settled.items():
        given = [
            "config=classify",
            f"task.train={runs / 'rows.jsonl'}",
            f"model.name={runs / 'base'}",
            "budget.queries=8",
        ]
        run(compose([*given, "trainable=auto", *words, f"output_dir={tmp_path / trained}"]))
        facts = json.loads((tmp_path / trained / "report.json").read_text())
        assert facts["trainable"] == trained
        assert facts.get("trainable_settings") == ({"num_blocks": 1} if trained == "last_blocks" else None)


def test_an_adapter_knows_its_base_from_any_folder(runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    for where in (runs / "adapter" / "model", exported(capsys, runs / "adapter", tmp_path / "export")):
        config = json.loads((where / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(runs / "base")
    monkeypatch.chdir(runs)
    assert portable_name("base") == str(runs / "base")
    assert portable_name("nowhere") == "nowhere"


def test_pushing_uploads_the_export(runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, **given: Any) -> Any:
            seen.update(given, name=name)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **given: Any) -> None:
            seen.update(given, files=sorted(path.name for path in Path(given["folder_path"]).iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["export", f"run={runs / 'whole'}", f"output={tmp_path / 'out'}", "--push", "me/mine"]) == 0
    assert "pushed  https://huggingface.co/me/mine" in capsys.readouterr().out
    assert (seen["name"], seen["private"]) == ("me/mine", True)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(seen["files"])
    assert 'from_pretrained("me/mine")' in (tmp_path / "out" / "README.md").read_text()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Client Error\nmore")

    monkeypatch.setattr(Api, "create_repo", refuse)
    from zoft.errors import UserError

    with pytest.raises(UserError, match="could not push to me/mine: 401 Client Error; log in with"):
        pushing.push(tmp_path / "out", "me/mine", public=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run= is missing"),
        (["run=nowhere"], "run=nowhere holds no config.yaml"),
        (["run=RUN", "--merge", "--gguf"], "--gguf merges by itself"),
        (["run=RUN", "--quantize", "q8_0"], "add --gguf"),
        (["run=RUN", "--gguf", "--quantize", "q8"], "got 'q8'. Did you mean q8_0?"),
        (["run=RUN", "--gguf", "--quantize"], "--quantize is followed by a value"),
        (["run=RUN", "--push", "a b/c"], "is no name on the hub"),
        (["run=RUN", "--push", "me/mine"], "HF_HUB_OFFLINE is set"),
        (["run=RUN", "--public"], "--public is of --push NAME"),
        (
            ["run=RUN", "--gguf", "output=tuned.gguf"],
            "output= is a folder, in which files have names of their own: output=tuned",
        ),
        (["run=RUN", "output=full"], "output=full is there and not empty"),
        (["run=RUN", "--gguff"], "Did you mean --gguf?"),
    ],
)
def test_wrong_requests_are_one_sentence(
    words: list[str], message: str, runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", *(word.replace("RUN", str(runs / "whole")) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert not (runs / "whole" / "export").exists()


@pytest.mark.parametrize("peft", ["prefix", "prompt"])
def test_an_adapter_of_inputs_has_nothing_to_merge(peft: str, tmp_path: Path, capsys: Any):
    run(compose(arguments(tmp_path, tmp_path / "run", f"peft={peft}", "budget.queries=8")))
    for flag in ("--merge", "--gguf"):
        assert main(["export", f"run={tmp_path / 'run'}", flag]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"peft={peft} adds inputs and no weights to merge: export it without --merge or --gguf" in said
    assert not (tmp_path / "run" / "export").exists()


def test_a_vocabulary_without_pairs_is_refused(tmp_path: Path):
    from tests.runs import tiny_tokenizer
    from zoft.errors import UserError
    from zoft.use.export.gguf_file import require

    with pytest.raises(UserError, match="byte-level pairs"):
        require(tiny_llama().config, tiny_tokenizer())
    from tests.models import tiny_opt

    with pytest.raises(UserError, match="this one is of type opt: export with --merge"):
        require(tiny_opt().config, pairs_tokenizer())


def test_fault_12_the_card_of_a_prefix_in_mezos_layout_loads_it_as_it_was_trained(tmp_path: Path):
    from tests.runs import model_folder
    from zoft.lm.models.load import load_model
    from zoft.lm.models.peft.prefix import Prefix
    from zoft.use.export.card import write_card

    base = model_folder(tmp_path / "base")
    wrapped = Prefix(layout="mezo").wrap(
        load_model(str(base)), 0, "v1"
    )  # fault 13: an adapter knows which base it is of
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (tmp_path / "adapter" / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    facts = {"model": str(base), "metric": "accuracy"}
    card = write_card(tmp_path / "adapter", facts, kind="adapter", head="causal", name=str(tmp_path / "adapter"))
    assert 'revision="v1"' in card.read_text()
    names: dict[str, Any] = {}
    exec(card.read_text().split("```python\n")[1].split("```")[0], names)
    assert torch_equal(logits(names["model"]), logits(wrapped))


def torch_equal(one: Any, other: Any) -> bool:
    import torch

    return bool(torch.equal(one, other))


def test_a_run_that_a_function_judged_is_exported_and_used_without_it(tmp_path: Path, capsys: Any, monkeypatch: Any):
    """A config file that names code is refused where it would be called, and not where the model alone is wanted."""
    from tests.runs import WORDS, model_folder

    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{word} is it"}) + "\n" for word in WORDS * 2))
    judge = Path("judge.py")
    judge.write_text("def score(prompts, generations):\n    return [float(len(text)) for text in generations]\n")
    words = [
        "config=reward",
        "model.name=./model",
        "task.train=prompts.jsonl",
        "task.max_length=64",
        "budget.queries=8",
    ]
    words += ["objective.max_new_tokens=4", "objective.function=./judge.py:score", "output_dir=out"]
    run(compose(words))
    judge.unlink()
    card = exported(capsys, Path("out"), Path("exported")) / "README.md"
    assert "| function | ./judge.py:score |" in card.read_text()
    again = next(line for line in card.read_text().splitlines() if line.startswith("Again, exactly"))
    assert "objective.function=./judge.py:score" in again
    for verb in (
        ["generate", "run=out", "prompt=free", "max_new_tokens=9"],
        ["predict", "run=out", "data=prompts.jsonl"],
    ):
        assert main(verb) == 0, capsys.readouterr().err
    assert main(["eval", "run=out"]) == 2
    assert "names a function to call, objective.function=./judge.py:score" in capsys.readouterr().err
