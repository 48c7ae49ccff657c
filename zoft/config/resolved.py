"""A run's config.yaml: every value, no references, and itself an experiment that reproduces the run."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from zoft.component import GROUPS, Component, components
from zoft.config.loader import compose
from zoft.config.own import words
from zoft.config.schema import ZoftConfig
from zoft.utils.files import at_home
from zoft.utils.own_files import digest


def resolved_yaml(source: ZoftConfig | list[str]) -> str:
    """The YAML text of a run, with every value in it; ``zoft train config=that.yaml`` composes the same run.

    Args:
        source: a run's config, or the arguments that compose it.

    Returns:
        A Hydra experiment: the choice of every part, then every value.
    """
    cfg = source if isinstance(source, ZoftConfig) else compose(source)
    parts = {group: _choice(group, getattr(cfg, group)) for group in GROUPS}
    defaults = ["_self_", *({f"override /{group}": name} for group, name in parts.items())]
    header = "# @package _global_\n"
    again = " ".join(["zoft train config=<this file> output_dir=<a new folder>", *words(cfg)])
    header += f"# Everything this run was made of. Again: {again}\n"
    for group in GROUPS:
        for name, sha in getattr(cfg, group).own_code().items():  # a line like any other: it must stay the same
            header += f"# {group}: {name} has the SHA-256 {sha}\n"
    header += "".join(f"{line}\n" for line in data_lines(cfg))
    return header + OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **_plain(cfg)}))


def data_lines(cfg: ZoftConfig) -> list[str]:
    """A line for each file of rows that the task reads, with its digest: of other rows a finished run says nothing."""
    named = {key: str(getattr(cfg.task, key, None) or "") for key in ("train", "validation")}
    files = {key: path for key, name in named.items() if (path := at_home(name)).is_file()}
    return [f"# task.{key}: {named[key]} has the SHA-256 {digest(str(path))}" for key, path in files.items()]


def _choice(group: str, part: Component) -> str:
    return part.own_file or next(name for name, cls in components(group).items() if cls is type(part))


def _plain(cfg: ZoftConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items() if (key, value) != ("auto", [])}
