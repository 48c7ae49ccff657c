"""The choices of each config group, found by file name, and the folder of shipped configs; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import re
from functools import lru_cache
from pathlib import Path

from zoft.component import GROUPS

PRESET_GROUPS = ("config", "method", "model", "budget", "tracker", "diagnostics", "launcher")
"""Groups that exist as YAML files only."""

ORDER = (
    *("config", "model", "task", "peft", "trainable"),
    *("method", "subspace", "estimator", "weighting", "optimizer", "engine", "objective"),
    *("budget", "tracker", "diagnostics", "launcher"),
)
"""Every group, in the order in which a user meets them."""

ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.learning_rate"),
    **dict.fromkeys(("batch_size", "bs", "per_device_train_batch_size"), "trainer.per_device_train_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "steps", "max_steps"), "budget.queries"),
    **dict.fromkeys(("model_name", "model_name_or_path", "model_id", "base_model", "checkpoint"), "model.name"),
    **dict.fromkeys(("data", "dataset", "dataset_name", "train_file", "data_path", "data_file"), "task.train"),
    **dict.fromkeys(("output", "out", "output_path", "save_dir"), "output_dir"),
    **dict.fromkeys(("q", "num_samples", "n_directions"), "estimator.num_directions"),
    **dict.fromkeys(("mu", "sigma", "zo_eps", "epsilon"), "estimator.eps"),
    **dict.fromkeys(("max_len", "max_seq_length", "max_length", "seq_len"), "task.max_length"),
    **dict.fromkeys(("lora_r", "lora_rank"), "peft.r"),
    **dict.fromkeys(("dtype", "torch_dtype"), "model.dtype"),
    **dict.fromkeys(("use_peft", "lora"), "peft"),
}
"""What other trainers call a key -> the key."""

_COMPONENT = re.compile(r"^@dataclass\b.*\nclass [A-Z]\w*\(", re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parent.parent


def configs_dir() -> Path:
    """The shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def user_configs_dir() -> Path | None:
    """The working directory's own ``configs`` folder, unless it is the shipped one or absent."""
    folder = Path.cwd() / "configs"
    return folder if folder.is_dir() and folder.resolve() != configs_dir().resolve() else None


def config_dirs() -> list[Path]:
    """Where presets are looked for, the user's first."""
    user_dir = user_configs_dir()
    return [*([user_dir] if user_dir else []), configs_dir()]


def component_names(group: str, *, plugins: bool = True) -> list[str]:
    """Names of a group's components from file names alone; nothing is imported.

    Args:
        group: any group; one without components has none.
        plugins: also those of other packages (entry points), which costs a scan of what is installed.
    """
    if group not in GROUPS:
        return []
    folder = _PACKAGE.joinpath(*GROUPS[group].split(".")[1:])
    files = [file for file in folder.glob("*.py") if file.stem != "base" and not file.stem.startswith("_")]
    names = {file.stem for file in files if _COMPONENT.search(file.read_text(encoding="utf-8"))}
    if plugins:
        names |= _plugin_names(group)
    return sorted(names)


@lru_cache
def _plugin_names(group: str) -> frozenset[str]:
    return frozenset(entry.name for entry in importlib.metadata.entry_points(group=f"zoft.{group}"))


def preset_files(group: str) -> dict[str, Path]:
    """Presets of a group: name -> YAML file; a user's file hides a shipped one of its name."""
    files: dict[str, Path] = {}
    for folder in reversed(config_dirs()):
        files.update({file.stem: file for file in (folder / group).glob("*.yaml")})
    user_dir = user_configs_dir()
    if group == "config" and user_dir:  # configs/mine.yaml is as good a place as configs/config/mine.yaml
        files.update({file.stem: file for file in user_dir.glob("*.yaml") if file.stem not in files})
    return dict(sorted(files.items()))


def choices(group: str, *, plugins: bool = True) -> list[str]:
    """Everything that ``group=`` accepts."""
    return sorted({*component_names(group, plugins=plugins), *preset_files(group)})


def first_comment(file: Path) -> str:
    """The first sentence of the comment that opens a YAML file: what the file is for."""
    texts = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.lstrip("# ").startswith("@"):  # a Hydra directive
            texts.append(line.lstrip("# "))
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", " ".join(texts))[0].strip()
