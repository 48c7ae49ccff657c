"""Components: the base class of every part that a config names, and the lookup by file name.

A component is a dataclass whose fields are hyper-parameters. It is at once the thing that runs, the Hydra schema of
its group, an entry of `zoft ls`, and a row of the contract tests. Adding one is adding one file to its group's folder,
no registry to edit; from outside it is an entry point `zoft.<group>`, or a file of one's own, `./my_file.py:Class`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import logging
import pkgutil
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from zoft.errors import Conditions, UserError, did_you_mean, refuse_unmet
from zoft.utils import own_files

log = logging.getLogger(__name__)

GROUPS: dict[str, str] = {
    "subspace": "zoft.subspaces",
    "estimator": "zoft.estimators",
    "weighting": "zoft.weightings",
    "engine": "zoft.engines",
    "optimizer": "zoft.optimizers",
    "objective": "zoft.lm.objectives",
    "trainable": "zoft.lm.models.trainable",
    "peft": "zoft.lm.models.peft",
    "task": "zoft.lm.tasks",
}
"""Group name (as on the command line) -> the package whose files are its components."""

Memory = dict[str, Any]
"""What a part remembers from step to step: plain numbers and lists of them, as journals and checkpoints hold them."""

C = TypeVar("C", bound="Component")


@dataclasses.dataclass
class Component:
    """Base of every component: fields are hyper-parameters, ``check`` says what cannot be.

    Treat an instance as immutable. State never lives here, so that it can be saved and resumed.
    """

    escapes: ClassVar[tuple[str, ...]] = ()
    r"""Fields of text that a model reads: in an argument of the command line, ``\n`` in them is a line break."""

    counts_with: ClassVar[Conditions] = {}
    """Fields that only count with some values of another one: elsewhere they are refused unless they have a default."""

    own_name: ClassVar[str] = ""
    """What a part from outside is called: ``my_est.py:Wide``, or its entry point's name."""

    own_sha256: ClassVar[str] = ""
    """Of the file that such a part comes from: a run does not go on with another one."""

    own_file: ClassVar[str] = ""
    """Where that is, as ``/abs/my_est.py:Wide``; empty for an entry point."""

    def __post_init__(self) -> None:
        self.check()
        refuse_unmet(self.counts_with, vars(self), self.defaults(), f"{self.name()}.")

    def check(self) -> None:
        """Raise :class:`zoft.errors.UserError` for values that cannot work."""

    @classmethod
    def name(cls) -> str:
        """The name it is chosen by: its file's name, e.g. ``one_sided``."""
        return str(vars(cls).get("own_name") or cls.__module__.rpartition(".")[2])

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of every field that has one."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    def own_code(self) -> dict[str, str]:
        """Code from outside that it runs: name -> SHA-256 of the file. A run does not go on with another one."""
        return {self.name(): self.own_sha256} if self.own_sha256 else {}

    def require(self, ok: bool, field: str, rule: str, hint: str = "") -> None:
        """Raise a :class:`UserError` that names ``field`` unless ``ok``; ``hint`` says what was probably meant."""
        if not ok:
            # the field by its full name: the message may be read far from where the value was written
            value = getattr(self, field)
            raise UserError(f"{self.name()}.{field} must be {rule}, got {value!r}{hint and f': {hint}'}")


@lru_cache
def components(group: str) -> dict[str, type[Component]]:
    """Every component of a group by name: the files of its package, then entry points of other packages.

    Args:
        group: a key of :data:`GROUPS`.

    Returns:
        name -> class, sorted by name; modules that begin with ``_`` and ``base`` are not components.

    Example:
        >>> {"central", "one_sided"} <= set(components("estimator"))
        True
    """
    # importing a group's files must stay cheap: components bring torch in lazily
    package = importlib.import_module(GROUPS[group])
    classes: dict[str, type[Component]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name.startswith("_") or module_info.name == "base":
            continue
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        classes.update({cls.name(): cls for cls in vars(module).values() if _is_component_of(cls, module.__name__)})
    # behind our own files: a package may bring a part, and under a name of ours replaces it
    for entry in importlib.metadata.entry_points(group=f"zoft.{group}"):
        try:
            cls = entry.load()
            if not (inspect.isclass(cls) and issubclass(cls, base_of(group))):
                raise UserError(f"it is no {base_of(group).__name__}")
            _require_fields(cls, entry.value)
        except Exception as error:  # another package's, which the run at hand may have nothing to do with
            log.warning("%s=%s, which %s brings, is left out: %s", group, entry.name, entry.value, error)
            continue
        file = inspect.getsourcefile(cls)
        classes[entry.name] = _from_outside(cls, entry.name, own_files.digest(file) if file else "")
    return dict(sorted(classes.items()))


def find(group: str, choice: str) -> type[Component] | None:
    """The component of a name, or of a file of one's own; None where there is none of that name.

    Args:
        group: a key of :data:`GROUPS`.
        choice: a name, or ``FILE.py:Class``, whose file is then imported.

    Raises:
        UserError: the file has no such component.
    """
    return components(group).get(choice) if own_files.split(choice) is None else from_file(group, choice)


def from_file(group: str, choice: str) -> type[Component]:
    """A component that a file of one's own defines.

    Args:
        group: a key of :data:`GROUPS`.
        choice: ``FILE.py:Class``.

    Returns:
        The class, which knows its ``own_file`` and the SHA-256 of that from now on.

    Raises:
        UserError: no such file or class, or it is no component of that group, saying what it lacks.
    """
    path, _, name = choice.rpartition(":")
    # the file runs once a process, however often it is named
    where, base, known = f"{group}={choice}", base_of(group), parts_in(path, f"{group}={choice}")
    cls = known.get(name)
    if cls is None:
        what = "defines no part" if known else "defines no part at all, no dataclass that inherits from one,"
        raise UserError(f"{where}: {path} {what} called {name!r}.{did_you_mean(name, known)}")
    if not issubclass(cls, base):
        raise UserError(f"{where}: {name} must inherit from {base.__module__}.{base.__name__}, or from one below it")
    _require_fields(cls, where)
    return cls


def _require_fields(cls: type, where: str) -> None:
    """A subclass with annotations and no decorator would silently have its base's fields alone."""
    if "__dataclass_fields__" not in vars(cls) and vars(cls).get("__annotations__"):
        raise UserError(f"{where}: put @dataclass above class {cls.__name__}: its fields are its settings")


def parts_in(path: str, where: str) -> dict[str, type[Component]]:
    """The components that a file of one's own defines, by their class's name; they know their file from now on."""
    module, sha = own_files.module_of(path, where)
    parts = {name: cls for name, cls in vars(module).items() if _is_component_of(cls, module.__name__)}
    for name, cls in parts.items():
        _from_outside(cls, f"{Path(path).name}:{name}", sha).own_file = own_files.absolute(f"{path}:{name}")
    return parts


def group_of(cls: type[Component]) -> str:
    """The group that a class is a component of."""
    return next(group for group in GROUPS if issubclass(cls, base_of(group)))


def base_of(group: str) -> type[Component]:
    """The class that every component of a group inherits from."""
    module = importlib.import_module(f"{GROUPS[group]}.base")
    # the base is called as its group is: estimator -> Estimator
    return next(
        value
        for value in vars(module).values()
        if _is_component_of(value, module.__name__) and value.__name__.lower() == group
    )


def _from_outside(cls: type[Component], name: str, sha: str) -> type[Component]:
    if not cls.__module__.startswith("zoft."):  # another name for a part of ours leaves it as it is
        cls.own_name, cls.own_sha256 = name, sha
    return cls


def _is_component_of(value: Any, module_name: str) -> bool:
    return (
        inspect.isclass(value)
        and issubclass(value, Component)
        # imported into the file (a base, a helper) is not defined by it
        and value.__module__ == module_name
        and not value.__name__.startswith("_")
    )


def create(group: str, choice: str | Component | None, default: str, **fields: Any) -> Any:
    """A component from its name, or the instance itself.

    Args:
        group: a key of :data:`GROUPS`.
        choice: a name, ``FILE.py:Class``, an instance, or None for the default.
        default: the name used for None.
        fields: hyper-parameters for a component made from a name.

    Returns:
        The component.

    Raises:
        UserError: no component of that name; the near ones are listed.

    Example:
        >>> create("optimizer", "sgd", "sgd").name()
        'sgd'
    """
    # an instance is taken as it is: its fields are settled
    if isinstance(choice, Component):
        base = base_of(group)
        if not isinstance(choice, base):
            raise UserError(f"{group}= takes a part that inherits from {base.__name__}, got {choice!r}")
        _require_fields(type(choice), f"{group}=")
        return choice
    if inspect.isclass(choice):
        raise UserError(f"{group}= takes a part, not its class: give {choice.__name__}(), with its settings")
    name = default if choice is None else choice
    cls = find(group, name) if isinstance(name, str) else None
    if cls is None:
        raise UserError(f"there is no {group} called {name!r}.{did_you_mean(str(name), components(group))}")
    return cls(**fields)


def describe(cls: type[Component]) -> list[tuple[str, str, str, str]]:
    """The hyper-parameters of a component: (name, type, default, what it means).

    The meaning comes from the ``Args:`` section of the docstring of the class that has the field, or of a base of it,
    so it is written once.
    """
    meanings: dict[str, str] = {}
    # from the first base down, so that a class's own words replace its base's
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        meanings |= re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.M)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else "(required)"
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = getattr(field.type, "__name__", "") if isinstance(field.type, type) else ""
        rows.append(
            (field.name, kind or str(field.type), repr(default), re.sub(r"\s+", " ", meanings.get(field.name, "")))
        )
    return rows
