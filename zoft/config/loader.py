"""From arguments to a run: Hydra's loader with zoft's precedence and checks, and one sentence for every mistake."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, setup_globals
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from zoft.component import GROUPS, Component, components
from zoft.config import arguments, auto, experiments, own, recommended, texts
from zoft.config.catalog import ORDER, choices, config_dirs, configs_dir, user_configs_dir
from zoft.config.check import Checker, refuse_code, translated
from zoft.config.foldername import suffix
from zoft.config.ignored import refuse_steps
from zoft.config.schema import ZoftConfig
from zoft.errors import UserError, of_recorded
from zoft.trainer.values import COUNTS_WITH

log = logging.getLogger("zoft.config")
DEFAULT_DIR = str(ZoftConfig.__dataclass_fields__["output_dir"].default)
PRIMARY = "zoft_train"  # configs/train.yaml under a name that no file of a user's ./configs can hide


def compose(overrides: list[str], *, runs_code: bool = True, recorded: bool | None = None) -> ZoftConfig:
    """The run that these arguments describe; components are instances, everything is checked.

    Args:
        overrides: as on the command line: ``config=quickstart``, ``estimator=one_sided``, ``estimator.eps=1e-2``.
        runs_code: whether functions that the config names may be called; what a file alone names is then refused.
        recorded: whether they name the config of a run that is read, and not trained: what that has ignored is let
            pass; without ``runs_code`` it is one.

    Returns:
        The run's config.

    Raises:
        UserError: anything wrong with them, saying what, where and how to mend it.

    Example:
        >>> compose(["config=quickstart", "estimator.eps=1e-2"]).estimator.radius
        0.01
    """
    loader = Loader()
    loader.runs_code = runs_code
    own.register_named(overrides)
    with of_recorded(not runs_code if recorded is None else recorded):
        cfg = loader.load([texts.argument(override) for override in overrides])
        if OmegaConf.to_container(cfg)["output_dir"] == DEFAULT_DIR:
            cfg.output_dir = DEFAULT_DIR + suffix(overrides)
        config = to_config(cfg)
    config.chosen = loader.chosen
    return config


def to_config(cfg: DictConfig) -> ZoftConfig:
    """A composed config as plain dataclasses."""
    with translated():
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} must be given: add {missing[0]}=...")
        try:
            config = cast(ZoftConfig, OmegaConf.to_object(cfg))
        except UserError as error:  # a component speaks of itself, the user knows it by its group
            message = str(error)
            for group in GROUPS:
                cls = cast(type[Component], OmegaConf.get_type(cfg, group))
                fields = "|".join(field.name for field in dataclasses.fields(cls))
                if fields:
                    message = re.sub(rf"(?<![\w./=]){cls.name()}\.(?=(?:{fields})\b)", f"{group}.", message)
            raise type(error)(message) from error
    for warning in config.warnings():
        _note_once(warning)
    return config


@lru_cache
def _note_once(text: str) -> None:
    log.warning(text)


class Sources(ConfigRepository):
    """Where configs are found. Hydra copies this for every composition, and would copy every component with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Sources:
        return copy.copy(self)  # what it does to its copy is to give it another list of sources

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A config; of a file, what zoft reads: text as it is written."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() != "file" or config_path.startswith("hydra/"):
            return cast(ConfigResult | None, super().load_config(config_path))
        file = Path(source.path) / f"{config_path.removesuffix('.yaml')}.yaml"
        header = source._get_header_dict(file.read_text(encoding="utf-8", errors="replace")[:512])
        group = config_path.rpartition("/")[0]
        places = texts.places() if header.get("package") == "_global_" else texts.places().get(group, {})
        content = experiments.read(file, str(file), places)
        defaults = self._create_defaults_list(config_path, self._extract_defaults_list(config_path, content))
        return ConfigResult(source.provider, f"file://{source.path}", content, header, defaults)


class _Parts(NamedTuple):
    """What a choice of parts comes to before arguments set values in it."""

    cfg: DictConfig
    checker: Checker
    files: list[tuple[dict[str, Any], str]]  # what each file sets, and where it lies
    notes: list[str]


_PARTS: dict[Any, _Parts] = {}
"""Those of this process: a sweep, a bench and a search compose hundreds of runs that differ in values alone."""
_MOST_PARTS = 32  # a megabyte each


class Loader(ConfigLoaderImpl):
    """Hydra's config loader for one command line; picklable, so that a sweep's workers compose as their parent did.

    Precedence, lowest first: train.yaml and the parts it chooses, the method an experiment chooses, the experiment
    (``config=``), the method chosen by an argument, arguments.
    """

    def __init__(self) -> None:
        _prepare()
        path = ConfigSearchPathImpl()
        path.append("hydra", "pkg://hydra.conf")
        for folder in config_dirs():
            path.append("main" if folder == configs_dir() else "user", f"file://{folder}")
        path.append("schema", "structured://")
        super().__init__(path)
        self.repository = Sources(path)
        self.experiments = experiments.Experiments()
        self.sweeping = False
        self.runs_code = True
        self.chosen = ""  # of the last composition: which method was taken where none was named, and why
        self._implied = False  # whether the adapter that was chosen is trained without a word about it
        self.cells: dict[tuple[str, ...], str] = {}  # a sweep's cell -> its folder's name
        self._noted: set[str] = set()
        self._files: list[tuple[dict[str, Any], str]] = []
        self._notes: list[str] = []

    def load(self, overrides: list[str]) -> DictConfig:
        """The composed config of one run, without Hydra's own node."""
        cfg = self._load(overrides, self._with_parts)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    def parse(self, overrides: list[str]) -> list[Override]:
        """Hydra's grammar; raises :class:`UserError` for what is not ``key=value``."""
        return [arguments.parse(OverridesParser.create(config_loader=self), text) for text in overrides]

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose one run; what Hydra would do, after the arguments were checked and rewritten."""
        hydra = super().load_configuration
        return self._load(overrides, lambda words: hydra(PRIMARY, words, run_mode, False, validate_sweep_overrides))

    def _load(self, overrides: list[str], compose: Callable[[list[str]], DictConfig]) -> DictConfig:
        with translated(self.experiments):
            self.experiments.labels = {"config": None, "method": None}
            self.experiments.trusted = own.register_named(overrides)  # in a sweep's worker for the first time
            overrides, chosen, given = auto.split(overrides)
            complete = arguments.with_adapter(overrides)
            self._implied = len(complete) > len(overrides)
            parsed = self.parse(complete)
            rewritten = arguments.rewrite(parsed, self.experiments, sweeping=self.sweeping)
            self._chosen_by_arguments = frozenset(o.key_or_group for o in parsed if o.key_or_group in GROUPS)
            self._values = [o for o in parsed if arguments.is_value(o)]
            self.chosen, named = "", recommended.is_named(parsed, self.experiments)
            # a method that nobody named stands where an experiment's would, below what the experiment sets
            cfg = compose(rewritten if named else [*rewritten, f"method={recommended.BEST}"])
            if not named:
                choice = recommended.recommended(cfg)
                cfg = cfg if choice.method == recommended.BEST else compose([*rewritten, f"method={choice.method}"])
                self.chosen = choice.line()
            auto.settled(cfg, chosen, given)
            refuse_steps(cfg.trainer, {override.key_or_group for override in self._values})
        return self._labelled(cfg)

    def _with_parts(self, overrides: list[str]) -> DictConfig:
        """What Hydra composes of these words; of parts that were put together before, values alone are set."""
        parsed = self.parse(overrides)
        values = [one for one in parsed if arguments.is_value(one)]
        words = [text for text, one in zip(overrides, parsed, strict=True) if not arguments.is_value(one)]
        # values on which it depends what of a file counts
        decisive = str([one.input_line for one in self._values if one.key_or_group in _decisive()])
        files = decisive, str(self.experiments.contents), user_configs_dir() or configs_dir()
        key = (*words, self._chosen_by_arguments, self._implied, *files)
        parts = _PARTS.get(key)
        if parts is None:
            self._files, self._notes = [], []
            cfg = super().load_configuration(PRIMARY, words, RunMode.RUN, False)
            parts = _Parts(cfg, self._checker, self._files, self._notes)
            # files of a user may be others the next time
            if user_configs_dir() is None and not any(part.own_file for part in self._checker.chosen.values()):
                _PARTS[key] = parts
                if len(_PARTS) > _MOST_PARTS:
                    del _PARTS[next(iter(_PARTS))]
        else:
            self._check_values(parts.checker)
            for data, where in parts.files:
                self._refuse_code(data, where)
            for text in parts.notes:
                self.note(text)
        cfg = copy.deepcopy(parts.cfg)
        self._apply_overrides_to_config(values, cfg)
        return cfg

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """One cell of a sweep: composed by itself, in a folder of its own under the sweep's."""
        with of_recorded(is_recorded=True):  # what does nothing was refused before the first cell began
            cfg = self.load_configuration(PRIMARY, list(sweep_overrides), RunMode.RUN)
        cfg.hydra.sweep.dir = master_config.hydra.sweep.dir
        name = self.cells[tuple(sweep_overrides)]
        cfg.output_dir = os.path.join(cfg.hydra.sweep.dir, name) if name else cfg.hydra.sweep.dir
        return cfg

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """A group's choices, for ``estimator=glob(*)``; without the names that zoft registers for itself."""
        if group_name in ORDER:
            return choices(group_name)
        return cast(list[str], super().get_group_options(group_name, results_filter, config_name, overrides))

    def _labelled(self, cfg: DictConfig) -> DictConfig:
        # A name inside the file wins: a run's own config.yaml keeps the name of the experiment it came from.
        if cfg.config == "run" and self.experiments.labels["config"]:
            cfg.config = self.experiments.labels["config"]
        choices = cfg.hydra.runtime.choices
        method = choices.get(arguments.METHOD_SLOT) or choices.get("method")
        if method and cfg.method is None:
            cfg.method = method
        return cfg

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        # Every part is known here, and nothing is merged yet: the moment to check what arguments and files set.
        chosen = dict(default.config_path.split("/", 1) for default in defaults if _is_component(default))
        given = {override.key_or_group: override.value() for override in self._values}
        self._checker = Checker({group: own.known(group)[name] for group, name in chosen.items()}, given)
        self._check_values(self._checker)
        self._replaced = self._replaced_parts(defaults, repo, chosen)
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _check_values(self, checker: Checker) -> None:
        for override in self._values:
            checker.check(arguments.nested(override), override.input_line or "")

    def _refuse_code(self, data: dict[str, Any], where: str) -> None:
        if self.runs_code:
            refuse_code(data, [arguments.nested(override) for override in self._values], where)

    def _replaced_parts(
        self, defaults: list[ResultDefault], repo: Any, chosen: dict[str, str]
    ) -> dict[str, frozenset[str]]:
        """For each preset, the groups in which something later chose another part than it was made for."""
        replaced, later = {}, set(self._chosen_by_arguments)
        for default in reversed(defaults):
            path = default.config_path or ""
            if not path.startswith(("config/", "method/")):
                continue
            groups = {
                str(item.group).lstrip("/"): item.value
                for item in repo.load_config(path).defaults_list or []
                if isinstance(item, GroupDefault) and item.override
            }
            replaced[path] = frozenset(group for group in later if groups.get(group) != chosen.get(group))
            later |= groups.keys() & GROUPS.keys()
        return replaced

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        path = default.config_path or ""
        source = str(repo.load_config(path).path)
        where = self.experiments.file_of(path) or f"{source.removeprefix('file://')}/{path}.yaml"
        if path.startswith("hydra/") and source.startswith("file://"):
            # Hydra calls what its own configs name (callbacks, launchers): only its packages may provide those.
            raise UserError(f"{where}: Hydra's own configs cannot be replaced")
        if _is_component(default) and source.startswith("file://"):
            raise UserError(f"{where} has the name of a component: call it something else")
        result = super()._load_single_config(default, repo)
        if path.startswith("hydra/") or path in ("zoft_schema", PRIMARY) or _is_component(default):
            return result
        data = OmegaConf.to_container(result.config, resolve=False)
        if not isinstance(data, dict):
            raise UserError(f"{where}: a config is a mapping of keys to values, got a {type(data).__name__}")
        data = cast(dict[str, Any], data)
        self._refuse_code(data, where)
        self._files.append((copy.deepcopy(data), where))
        dropped = self._checker.check(data, where, self._replaced.get(path, frozenset()))
        for key, why in dropped.items():
            section, field = key.split(".")
            del result.config[section][field]
            if section == "trainable" and self._implied:  # an adapter takes the whole part's place: nothing is lost
                continue
            self._notes.append(f"{key} of {where} is left out: {why}")
            self.note(self._notes[-1])
        return result

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._noted:
            self._noted.add(text)
            log.warning(text)


def _is_component(default: ResultDefault) -> bool:
    """Whether a file of the defaults list is a component's own schema (and not a YAML preset of its group)."""
    group, _, name = (default.config_path or "").partition("/")
    return group in GROUPS and name in own.known(group)


@lru_cache
def _decisive() -> set[str]:
    """Keys with some of whose values alone others count."""
    every = [(group, cls.counts_with) for group in GROUPS for cls in components(group).values()]
    every.append(("trainer", COUNTS_WITH))
    return {f"{group}.{other}" for group, conditions in every for other, _ in conditions.values()}


_PREPARED: list[bool] = []


def _prepare() -> None:
    """Once a process: Hydra's globals, and every component as a schema in its store."""
    if _PREPARED:
        return
    version.setbase("1.3")
    Plugins.instance()
    setup_globals()
    JobRuntime.instance().set("name", "zoft")
    store = ConfigStore.instance()
    store.store(name="zoft_schema", node=ZoftConfig, provider="zoft")
    for group in GROUPS:
        for name, cls in components(group).items():
            store.store(group=group, name=name, node=cls, provider="zoft")
    store.store(name=PRIMARY, node=experiments.read(configs_dir() / "train.yaml", "train.yaml"), provider="zoft")
    _PREPARED.append(True)
