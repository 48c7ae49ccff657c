"""Bad input: one sentence that says what, where and how to mend; nothing imported that is slow, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from zoft.cli import main
from zoft.config import compose
from zoft.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

ARGUMENTS = [
    # unknown keys, at every depth, with and without +
    ("estimator.epss=1", "Did you mean eps?"),
    ("+estimator.epss=1", "Did you mean eps?"),
    ("++estimator.epss=1", "Did you mean eps?"),
    ("estimator.num_direction=1", "num_directions"),
    ("estimatr.eps=1", "Did you mean estimator?"),
    ("+estimatr.eps=1", "Did you mean estimator"),
    ("eps=1", "Did you mean estimator.eps or diagnostics.eps?"),
    ("lr=1", "there is no key 'lr'"),
    ("learning_rate=1", "Did you mean optimizer.learning_rate?"),
    ("per_device_train_batch_size=1", "Did you mean trainer.per_device_train_batch_size?"),
    ("queries=10", "Did you mean budget.queries?"),
    ("+foo=1", "there is no key 'foo'"),
    ("+foo.bar.baz=1", "there is no key 'foo'"),
    ("optimizer.learning_rte=1", "Did you mean learning_rate?"),
    ("optimizer.adam_beta1=0.5", "belongs to optimizer=adam, adamw and replay_adam"),
    ("subspace.lw=gaussian", "Did you mean law?"),
    ("model.namee=x", "Did you mean name?"),
    ("model.d_type=x", "Did you mean dtype?"),
    ("budget.query=5", "Did you mean queries?"),
    ("tracker.report=5", "Did you mean report_to?"),
    ("task.num_trian=5", "Did you mean num_train"),
    ("objective.foo=1", "has no 'foo'"),
    ("sed=1", "Did you mean seed?"),
    ("outputdir=x", "Did you mean output_dir"),
    # TrainingArguments
    ("trainer.logging_step=1", "trainer.logging_steps"),
    ("+trainer.loging_steps=1", "trainer.logging_steps"),
    ("trainer.learning_rate=1", "set optimizer.learning_rate"),
    ("trainer.lerning_rate=1", "optimizer.learning_rate"),
    ("trainer.weight_decay=1", "set optimizer.weight_decay"),
    ("trainer.seed=1", "set seed"),
    ("trainer.output_dir=x", "set output_dir"),
    ("trainer.report_to=wandb", "set tracker.report_to"),
    ("trainer.max_steps=10", "set budget.queries"),
    ("trainer.num_train_epochs=10", "set budget.queries"),
    ("trainer.optim=sgd", "set optimizer"),
    ("trainable=regex", "trainable.pattern must be a regular expression"),
    ("trainer.hub_token=abc", "HF_TOKEN"),
    ("trainer.bf16=1", "must be bool"),
    ("trainer.eval_steps=often", "must be float or None"),
    ("trainer.nonsense_of_all_kinds=1", "not a field of transformers.TrainingArguments"),
    ("trainer.disable_tqdm=true", "plain lines where there is no terminal"),
    ("trainer.resume_from_checkpoint=x", "the same command resumes"),
    # what transformers would take for something else, or would not heed
    ("trainer.eval_steps=0", "trainer.eval_steps must be a whole number of steps from 1 on, or a share of the run"),
    ("trainer.eval_steps=-1", "got -1; trainer.eval_strategy=no evaluates at no step"),
    ("trainer.eval_steps=2.5", "or a share of the run between 0 and 1, got 2.5"),
    ("trainer.save_steps=0", "trainer.save_steps=0 does nothing: trainer.save_strategy=no saves no checkpoint"),
    ("trainer.logging_steps=-2", "got -2; trainer.logging_strategy=no logs nothing"),
    ("trainer.eval_delay=-3", "trainer.eval_delay must be at least 0, got -3"),
    ("trainer.warmup_steps=-1", "trainer.warmup_steps must be at least 0, got -1"),
    ("trainer.warmup_steps=5", "warmup_steps=5 would be ignored: trainer.lr_scheduler_type=constant has no warmup"),
    ("+trainer.lr_scheduler_kwargs={a: 1}", "trainer.lr_scheduler_kwargs would be ignored"),
    ("trainer.save_total_limit=0", "must be at least 1, got 0; leave it out to keep all checkpoints"),
    ("trainer.eval_accumulation_steps=0", "trainer.eval_accumulation_steps must be at least 1, got 0"),
    ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers must be at least 0, got -1"),
    ("trainer.dataloader_persistent_workers=true", "set trainer.dataloader_num_workers too"),
    ("trainer.dataloader_prefetch_factor=2", "set trainer.dataloader_num_workers too"),
    ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size must be at least 1, got 0"),
    ("trainer.frozen_prefix_mb=-1", "trainer.frozen_prefix_mb must be at least 0, got -1"),
    ("trainer.journal_hash_steps=-1", "trainer.journal_hash_steps must be at least 0, got -1"),
    ("trainer.max_grad_norm=-1", "trainer.max_grad_norm must be at least 0, got -1; 0 clips nothing"),
    ("trainer.ddp_timeout=0", "trainer.ddp_timeout must be at least 1, got 0"),
    ("trainer.log_level=warn", "trainer.log_level=warn is none of its values. Did you mean warning?"),
    ("trainer.train_sampling_strategy=sequental", "is none of its values. Did you mean sequential?"),
    ("trainer.label_smoothing_factor=0.5", "would not be heeded: the run's objective computes the loss"),
    ("trainer.prediction_loss_only=true", "would not be heeded"),
    ("trainer.eval_do_concat_batches=false", "would not be heeded"),
    ("trainer.push_to_hub=true", "`zoft export run=DIR --push OWNER/NAME`"),
    ("trainer.hub_model_id=a/b", "`zoft export run=DIR --push OWNER/NAME`"),
    # parts that do not go together
    ("peft=lora trainable=all", "trainable=all trains weights of the base model, and only the adapter is saved"),
    ("peft=lora trainable=last_blocks", "only the adapter is saved: use trainable=adapter, or peft=none"),
    ("trainable=adapter", "trainable=adapter needs an adapter: choose peft=lora"),
    ("method=mezo engine=in_place engine.restore=subtract model.dtype=bfloat16", "does not bring bfloat16 weights"),
    ("method=lozo estimator.noise=torch_sequential", "subspace=low_rank needs estimator.noise=counter"),
    ("method=mezo estimator.noise=torch_sequential subspace.law=sphere", "subspace.law=sphere needs noise=counter"),
    ("estimator=forward_gradient engine=layerwise", "engine=layerwise evaluates losses"),
    ("estimator=forward_gradient engine=in_place", "needs exact derivatives: choose engine=auto"),
    ("estimator=central engine=forward_mode", "estimator=central needs losses"),
    # unknown choices
    ("config=quickstar", "Did you mean quickstart?"),
    ("estimator=centrall", "Did you mean central?"),
    ("method=mezzo", "Did you mean mezo"),
    ("model=opt125m", "Did you mean opt_125m"),
    ("model=me/mine", "One of the hub or a folder is model.name=me/mine."),
    ("task=sst_2", "Did you mean sst2"),
    ("peft=lore", "Did you mean lora?"),
    ("tracker=wandbb", "Did you mean wandb"),
    ("budget=quik", "Did you mean quick?"),
    ("estimator=null", "estimator cannot be left out"),
    ("estimator=[central]", "takes a name"),
    ("optimiser=sgd", "Did you mean optimizer"),
    ("foo/bar=baz", "there is no group 'foo/bar'"),
    ("estimator@x=central", "drop the part after '@'"),
    # wrong types and values
    ("seed=a", "seed must be a whole number, got 'a'"),
    ("seed=1.5", "seed must be a whole number, got 1.5"),
    ("seed=-1", "seed must be 0 or more"),
    ("seed=99999999999", "seed must be 0 or more and below 2**32"),
    ("seed=null", "seed must be a whole number, got None"),
    ("budget.queries=4e4", "write 40000"),
    ("budget.queries=0", "at least 1"),
    ("budget.queries=99999999999999999999", "budget.queries must be 100,000,000 or less (that is months), got 99999"),
    ("method=mezo budget.queries=1000000000", "budget.queries must be 100,000,000 or less"),
    ("budget.queries=1", "less than one step costs"),
    ("budget=100", "there is no budget called '100'"),
    ("estimator.eps=small", "estimator.eps must be a number, got 'small'"),
    ("estimator.eps=", "estimator.eps must be a number"),
    ("estimator.eps=-1", "estimator.eps must be > 0 and finite, got -1.0"),
    ("estimator.eps.x=1", "estimator.eps must be a number"),
    ("estimator.num_directions=0", "estimator.num_directions must be at least 1"),
    ("estimator.noise=counted", "estimator.noise must be one of"),
    ("model.dtype=fp32", "must be one of float32"),
    ("model.name=", "model.name is empty"),
    ("model.name=null", "model.name must be text"),
    ("model=gpt", "there is no model called 'gpt'"),
    ("tracker.mode=on", "must be one of online, offline"),
    ("tracker.report_to=wandb", "must be a list"),
    ("tracker.report_to=[wndb]", "Did you mean wandb?"),
    ("trainer=5", "trainer must be a mapping"),
    ("output_dir=", "output_dir is empty"),
    ("output_dir=${nope}", "nope"),
    # grammar, and what is not zoft's
    ("quickstart", "Did you mean config=quickstart?"),
    ("estimator.eps", "write key=value"),
    ("a=[", "cannot read the argument"),
    ("seed=1,2", "add -m"),
    ("~seed", "cannot be taken away"),
    ("~estimator", "estimator cannot be left out"),
    ("launcher=joblib", "add -m"),
    ("hydra.run.dir=x", "output_dir"),
    ("hydra.job.chdir=true", "output_dir"),
    ("hydra/launcher=joblib", "zoft keeps Hydra's own settings"),
    ("estimator._target_=os.system", "configs are data"),
    ("+_target_=os.system", "configs are data"),
    ("+trainer.fsdp_config={_target_: os.system}", "configs are data"),
    ("hydra.callbacks.x._target_=os.system", "configs are data"),
    # paths
    ("config=nowhere/mine.yaml", "there is no such file"),
    ("config=./mine.yml", "there is no such file"),
    ("config=./", "is a folder"),
]

FILES = [
    ("estimator: {epss: 1}", "estimator=nodes has no 'epss'. Did you mean eps?"),
    ("estimatr: {eps: 1}", "Did you mean estimator?"),
    ("seeds: 1", "Did you mean seed?"),
    ("seed: one", "seed must be a whole number, got 'one'"),
    ("trainer: {logging_step: 1}", "trainer.logging_steps"),
    ("trainer: {learning_rate: 1}", "set optimizer.learning_rate"),
    ("model: {namee: x}", "Did you mean name?"),
    ("model: opt_125m", "a preset is chosen by `- override /model: NAME`"),
    ("estimator: one_sided", "`- override /estimator: NAME`"),
    ("defaults: [override /estimator: centrall]", "Did you mean central?"),
    ("defaults: [estimator: central]", "write `- override /estimator: central`"),
    ("defaults: [override /method: mezzo]", "Did you mean mezo"),
    ("defaults: [override /estimatir: central]", "estimatir"),
    ("defaults: [quickstar]", "Did you mean quickstart?"),
    ("estimator: {_target_: os.system}", "configs are data"),
    ("trainer: {x: [{_target_: os.system}]}", "configs are data"),
    ("hydra: {callbacks: {x: {_target_: os.system}}}", "configs are data"),
    ("hydra: {run: {dir: x}}", "only hydra.launcher"),
    ("- a\n- b", "mapping of keys"),
    ("just words", "a config is a mapping of keys to values"),
    ("defaults: 5", "defaults is a list"),
    ("defaults: [override /launcher: jobli]", "Did you mean joblib?"),
    ("seed: [1\nmodel: x", "line 2"),
    ("seed: 1\nseed: 2", "duplicate key"),
    ("seed: ${nope}", "nope"),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("argument", "expected"), ARGUMENTS, ids=[argument for argument, _ in ARGUMENTS])
def test_argument(argument: str, expected: str, empty_folder: Path):
    with pytest.raises(UserError) as caught:
        compose([argument] if "{" in argument else argument.split(" "))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_file(text: str, expected: str):
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose(["config=mine.yaml"])
    assert expected in str(caught.value)
    if "${" not in text:  # an interpolation is resolved when everything is merged
        assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_in_the_own_configs_folder_is_named():
    Path("configs/model").mkdir(parents=True)
    Path("configs/model/tiny.yaml").write_text("namee: x")
    with pytest.raises(UserError, match=r"configs/model/tiny\.yaml: model has no 'namee'"):
        compose(["model=tiny"])
    Path("configs/model/tiny.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"configs/model/tiny\.yaml, line"):
        compose(["model=tiny"])


def test_unreadable_files():
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"binary\.yaml"):
        compose(["config=binary.yaml"])


def test_hydras_own_configs_cannot_be_replaced():
    Path("configs/hydra/callbacks").mkdir(parents=True)
    Path("configs/hydra/callbacks/evil.yaml").write_text("x: {_target_: os.getcwd}")
    Path("configs/model").mkdir(parents=True)
    Path("configs/model/tiny.yaml").write_text("# @package _global_\ndefaults: [override /hydra/callbacks: evil]")
    with pytest.raises(UserError, match="cannot be replaced"):
        compose(["model=tiny"])
    Path("mine.yaml").write_text("defaults: [override /hydra/callbacks: evil]")
    with pytest.raises(UserError, match="there is no group 'hydra/callbacks'"):
        compose(["config=mine.yaml"])


def test_a_preset_with_the_name_of_a_component():
    Path("configs/estimator").mkdir(parents=True)
    Path("configs/estimator/central.yaml").write_text("eps: 1")
    with pytest.raises(UserError, match=r"configs/estimator/central\.yaml has the name of a component"):
        compose(["estimator=central"])


def test_near_file_is_named():
    Path("mine.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"Did you mean mine\.yaml\?"):
        compose(["config=./mien.yaml"])


# ---------------------------------------------------------------------------------------------------------- the command


def zoft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoft", *arguments],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )  # fmt: skip


def test_exit_code_and_one_line():
    done = zoft("train", "estimator=central", "estimator.epss=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "zoft: error: estimator.epss=1: estimator=central has no 'epss'. Did you mean eps?\n"


def test_one_process_of_many_complains():
    assert zoft("train", "seed=x", RANK="1").stderr == ""
    assert "seed" in zoft("train", "seed=x", RANK="0").stderr


def test_traceback_on_request():
    assert "Traceback" in zoft("train", "seed=x", ZOFT_TRACEBACK="1").stderr


def test_rejection_imports_nothing_heavy():
    code = textwrap.dedent("""
        import sys
        from zoft.cli import main
        code = main(["train", "config=quickstart", "trainer.logging_step=1"])
        heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "wandb", "numpy"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy or code != 2 else 0)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainn"], "Did you mean train?"),
        (["config=quickstart"], "Did you mean zoft train?"),
        (["train", "--cgf"], "Did you mean --cfg?"),
        (["train", "--config", "quickstart"], "Did you mean config=...?"),
        (["train", "--method=mezo"], "Did you mean method=mezo?"),
        (["version", "x"], "zoft version takes no arguments, got 'x'"),
        (["completion", "x"], "zoft completion takes no arguments, got 'x'"),
        (["train", "--seed=1"], "Did you mean seed=1?"),
        (["train", "-m", "--cfg", "seed=1"], "drop -m"),
        (["ls", "estimatr"], "Did you mean estimator?"),
        (["show", "estimator/centrall"], "Did you mean central?"),
        (["show", "centrall"], "Did you mean central"),
        (["show", "mezo"], "zoft show method/mezo or zoft show budget/mezo"),
        (["show"], "say what to show"),
        (["fetch", "sms-spm"], "Did you mean sms-spam?"),
    ],
)
def test_other_commands(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_has_been_removed_is_a_sentence(tmp_path: Path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from zoft.cli import main; sys.exit(main(['show', 'central']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "has been removed: cd to another one" in done.stderr


def test_interruption_and_failure_have_their_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import types

    from zoft.errors import NonFiniteLossError

    for error, code in (
        (KeyboardInterrupt(), 130),
        (NonFiniteLossError("10 losses were NaN"), 1),
        (UserError("no"), 2),
    ):

        def run(cfg: object, error: BaseException = error, **more: object) -> None:
            raise error

        module = types.ModuleType("zoft.run.train")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "zoft.run.train", module)
        assert main(["train", "config=smoke"]) == code
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_where_a_folder_is_written_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"queries": 1}\n')
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "taken").touch()
    assert main(["compare", "run", "output=taken"]) == 2
    assert "taken: File exists: name a path" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [PermissionError(13, "Permission denied", "a/b.csv"), "predictions"])
def test_a_path_that_may_not_be_written_is_one_sentence_for_every_verb(wrong: object, monkeypatch, capsys, tmp_path):
    """Also where a verb has not looked before: here the file's folder is not there when it is written."""
    from zoft.cli import version
    from zoft.utils.files import write_atomically

    def command(arguments: list[str]) -> int:
        if isinstance(wrong, OSError):
            raise wrong
        write_atomically(tmp_path / "nowhere" / "rows.csv", "a")
        return 0

    monkeypatch.setattr(version, "command", command)
    assert main(["version"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    named = (
        "a/b.csv: Permission denied" if isinstance(wrong, OSError) else "nowhere/rows.csv: No such file or directory"
    )
    assert f"{named}: name a path that you may read and write" in said


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(28, "No space left on device", "a/b.csv"), "the disk of a/b.csv is full"),
        (OSError(28, "No space left on device", "from.csv", None, "to/it.csv"), "the disk of to/it.csv is full"),
        (OSError(122, "Disk quota exceeded"), "the disk of what this command writes is full"),
        (RuntimeError("I/O error: No space (os error 28)"), "the disk of what this command writes is full"),
    ],
)
def test_a_full_disk_is_one_sentence_for_every_verb(error: Exception, named: str, monkeypatch, capsys):
    from zoft.cli import version

    def command(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(version, "command", command)
    assert main(["version"]) == 2
    assert capsys.readouterr().err == f"zoft: error: {named}: free some space and repeat the command\n"
