"""Settings of `zoft attack`: key=value arguments, checked together before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoft.blackbox.attack.ball import LOSSES, Ball
from zoft.blackbox.attack.methods import AttackMethod
from zoft.blackbox.attack.subspaces import SUBSPACES
from zoft.errors import UserError, did_you_mean
from zoft.utils.words import read_words

RADII = {"digits": (0.2, 1.0), "fashion_mnist": (0.1, 1.5), "image": (8 / 255, 3.0)}
"""Radius where none is given, for linf and l2."""

_DATA = ("digits", "fashion_mnist")
_WHOLE = ("images", "first", "budget", "grid", "num_directions", "seed")


@dataclass(frozen=True)
class AttackSettings:
    """An attack from the command line.

    Args:
        data: ``digits`` or ``fashion_mnist``, with a small network trained on the spot; digits if neither it nor
            ``model`` is given.
        folder: of Fashion-MNIST's files, where Debian's package did not put them.
        model: an image classifier of transformers, by hub name or folder.
        image: the image file that it is asked about.
        label: the right class of the image; the model's own answer if left out.
        target: a class that is wanted, by name or number; left out, any but the right one.
        norm: ``linf`` or ``l2``.
        radius: bound on the perturbation; pixels are in [0, 1]. Left out: see :data:`RADII`.
        images: how many images of the data.
        first: number of the first one.
        budget: most queries for an image.
        method: how perturbations are searched.
        subspace: ``pixels``, ``square`` or ``low_frequency``.
        grid: rows and columns of a square or low-frequency subspace; a quarter of the image's side if left out.
        loss: ``margin`` or ``cross_entropy``.
        num_directions: directions a step, of methods that have them.
        eps: radius of their differences, in units of the bound.
        learning_rate: their step, in units of the bound.
        seed: of the random choices.
        output_dir: folder of the results; ``runs/attack-...`` if left out.
    """

    data: str | None = None
    folder: str | None = None
    model: str | None = None
    image: str | None = None
    label: str | None = None
    target: str | None = None
    norm: str = "linf"
    radius: float | None = None
    images: int | None = None
    first: int | None = None
    budget: int = 1000
    method: str = "flips"
    subspace: str = "pixels"
    grid: int | None = None
    loss: str = "margin"
    num_directions: int | None = None
    eps: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    output_dir: str | None = None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> AttackSettings:
        """From ``key=value`` arguments.

        Raises:
            UserError: what is not of this form, an unknown key, a value that cannot be, or one that has no effect.

        Example:
            >>> AttackSettings.of(["data=digits", "radius=8/255"]).resolved().radius
            0.03137254901960784
        """
        known = [field.name for field in dataclasses.fields(cls)]
        words = read_words("attack", arguments, keys=known)
        for word in words.rest:
            key = word.partition("=")[0]
            if key in known:
                raise UserError(f"{key} needs a value: write {key}=VALUE")
            raise UserError(f"zoft attack has no key {key!r}.{did_you_mean(key, known)} See zoft attack --help")
        for key, text in words.own.items():
            if not text:
                raise UserError(f"{key} needs a value: write {key}=VALUE")
        return cls(**{key: _value(key, text) for key, text in words.own.items()})

    def resolved(self) -> AttackSettings:
        """Checked, with the defaults that depend on other settings; ``grid`` depends on the image and stays."""
        if self.model is None and self.data is None and self.image is None:
            return dataclasses.replace(self, data="digits").resolved()
        self._check_source()
        for key, known in (("loss", LOSSES), ("subspace", SUBSPACES)):
            if getattr(self, key) not in known:
                raise UserError(f"there is no {key} {getattr(self, key)!r}.{did_you_mean(getattr(self, key), known)}")
        linf, l2 = RADII[self.data or "image"]  # the usual ones
        usual = linf if self.norm == "linf" else l2
        whole = self if self.radius is not None else dataclasses.replace(self, radius=usual)
        Ball(whole.norm, whole.radius or 0.0)
        whole.attack_method()
        if self.subspace == "pixels" and self.grid is not None:
            raise UserError("grid has no effect with subspace=pixels: use subspace=square or low_frequency, or drop it")
        if self.data is not None:
            whole = dataclasses.replace(whole, images=50 if self.images is None else self.images, first=self.first or 0)
        return whole if self.output_dir else dataclasses.replace(whole, output_dir=whole._usual_folder())

    def attack_method(self) -> AttackMethod:
        """The method with its settings."""
        changes = {key: getattr(self, key) for key in ("num_directions", "eps", "learning_rate")}
        return AttackMethod(self.method, {key: value for key, value in changes.items() if value is not None})

    def _check_source(self) -> None:
        if self.data is not None and self.data not in _DATA:
            raise UserError(f"there is no data {self.data!r}.{did_you_mean(self.data, _DATA)}")
        if self.data is not None and (self.model or self.image):
            raise UserError("data= brings its own classifier: give data, or model and image")
        if self.data is None and not (self.model and self.image):
            missing, given = ("image", "model") if self.model else ("model", "image")
            raise UserError(f"{given} needs {missing}: write zoft attack model=HUB_NAME_OR_FOLDER image=FILE")
        useless: tuple[str, ...] = ("images", "first", "folder") if self.data is None else ("label",)
        if self.data == "digits":
            useless += ("folder",)
        for key in useless:
            if getattr(self, key) is not None:
                raise UserError(
                    f"{key} has no effect with {'data=' + self.data if self.data else 'model'}: leave it out"
                )

    def _usual_folder(self) -> str:
        """Named by every setting that is not at its default."""
        from pathlib import Path

        what = self.data or f"{Path(self.model or '').name}-{Path(self.image or '').stem}"
        parts = [what, f"{self.norm}{self.radius:.4g}", self.method]
        named = ("data", "model", "image", "norm", "radius", "method", "seed", "output_dir", "folder")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            usual = {"images": 50, "first": 0}.get(field.name, field.default)
            if field.name not in named and value not in (None, usual):
                parts.append(f"{field.name}{value}".replace("/", "_"))
        return "runs/attack-" + "-".join([*parts, f"seed{self.seed}"])


def _value(key: str, text: str) -> Any:
    if key in _WHOLE:
        if not text.lstrip("-").isdecimal():
            raise UserError(f"{key} must be a whole number, got {text!r}")
        value, least = int(text), 0 if key in ("seed", "first") else 1
        if value < least:
            raise UserError(f"{key} must be at least {least}, got {value}")
        return value
    if key in ("radius", "eps", "learning_rate"):
        top, slash, bottom = text.partition("/")
        try:
            return float(top) / (float(bottom) if slash else 1.0)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{key} must be a number (8/255 will do), got {text!r}") from None
    return text
