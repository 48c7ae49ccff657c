"""A run's config, its tokenizer and its final model, on the device and in evaluation mode; or any model by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.utils.files import at_home


@dataclass
class Loaded:
    """A model that can write.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: the model's.
        name: the run's folder, or the model's name.
        cfg: the run's config; None where a model was named.
        base_model: the model before training where that is another object than ``model`` without its adapter.
    """

    model: Any
    tokenizer: Any
    name: str
    cfg: ZoftConfig | None = None
    base_model: Any = None

    @property
    def is_chat(self) -> bool:
        """Whether the run's rows are conversations."""
        if self.cfg is None or not hasattr(self.cfg.task, "reading"):
            return False
        task: Any = self.cfg.task
        return (task.reading().format if task.format == "auto" else task.format) == "chat"

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The model as it was before training."""
        if self.base_model is not None:
            yield self.base_model
        else:
            with self.model.disable_adapter():
                yield self.model


def config_of(run: str, overrides: list[str]) -> ZoftConfig:
    """The config of a finished run; functions that it names are not called in inference."""
    from zoft.config import compose
    from zoft.evaluation.evaluate import config_of_run
    from zoft.lm.tasks.custom import Custom
    from zoft.report.results import finished

    cfg = compose([f"config={config_of_run(run, overrides)}", *overrides], runs_code=False)
    said = (finished(Path(run)) or {}).get("read_as")
    # whoever gives settings of the task wants its rows read by them
    if said and isinstance(cfg.task, Custom) and not any(word.startswith("task.") for word in overrides):
        cfg.task.remember(said)
    return cfg


def load_run(run: str, overrides: list[str], *, with_base: bool = False) -> Loaded:
    """The final model of a run.

    Args:
        run: its folder.
        overrides: arguments that change its config.
        with_base: whether the model before training is wanted too; an adapter's costs nothing.
    """
    from zoft.evaluation.evaluate import model_of
    from zoft.lm.models.load import quiet
    from zoft.run.build import tokenizer_of
    from zoft.trainer.placing import to_read

    quiet()
    cfg = config_of(run, overrides)
    place = device(on_cpu=bool(cfg.trainer.get("use_cpu")))
    model, base = to_read(cfg.engine, model_of(cfg, run), place), None
    if with_base and not (Path(run) / "model" / "adapter_config.json").is_file():
        base = to_read(cfg.engine, model_of(cfg, ""), place)
    return Loaded(model, tokenizer_of(cfg, run), run, cfg, base)


def load_named(name: str) -> Loaded:
    """A model as it is, in float32.

    Args:
        name: hub name, folder, or ``zoft:<asset>``; a folder may be an adapter's.
    """
    from zoft.lm.models.load import load_model_as, load_tokenizer, quiet
    from zoft.lm.models.peft import load_adapter
    from zoft.lm.models.peft._load import base_of

    quiet()
    folder = at_home(name)
    if (folder / "adapter_config.json").is_file():
        base, revision = base_of(folder)
        tokenizer_name = name if (folder / "tokenizer_config.json").is_file() else base
        tokenizer = load_tokenizer(tokenizer_name, revision=revision if tokenizer_name == base else None)
        model = load_model_as("causal", base, revision=revision, tokenizer=tokenizer)
        return Loaded(load_adapter(model, folder).to(device()).eval(), tokenizer, name)
    tokenizer = load_tokenizer(name)
    return Loaded(load_model_as("causal", name, tokenizer=tokenizer).to(device()).eval(), tokenizer, name)


def require_writer(loaded: Loaded) -> None:
    """Refuse a model that writes no text."""
    from zoft.lm.logits.call import inner

    bare = inner(loaded.model)
    # an encoder has a class that generates too, whose tokens see those behind them: its config says is_decoder=False
    if not bare.can_generate() or not getattr(bare.config, "is_decoder", True):
        kind = type(bare).__name__
        raise UserError(f"{loaded.name} is a {kind}, which writes no text: zoft predict gives its labels")


def device(*, on_cpu: bool = False) -> Any:
    """Where models go: the accelerator where there is one, unless a run was made ``on_cpu`` (trainer.use_cpu)."""
    import torch

    has_one = torch.accelerator.is_available() and not on_cpu
    return torch.accelerator.current_accelerator() if has_one else torch.device("cpu")
