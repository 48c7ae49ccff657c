"""What Hydra and OmegaConf complain about, as one sentence of zoft's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from zoft.config.catalog import ORDER
from zoft.config.experiments import Experiments, yaml_message
from zoft.errors import UserError, did_you_mean

_PLUGINS = {"joblib": "hydra-joblib-launcher", "submitit": "hydra-submitit-launcher"}


@contextmanager
def translated(experiments: Experiments | None = None) -> Iterator[None]:
    """Turn whatever Hydra, OmegaConf or YAML raise inside into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(yaml_message(error, mark.name if mark else "a config")) from error
    except MissingConfigException as error:
        raise UserError(_named(_missing(error), experiments)) from error
    except (HydraException, OmegaConfBaseException, OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(_named(_sentence(error), experiments)) from error


def _missing(error: MissingConfigException) -> str:
    """A defaults list names what is not there."""
    path = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = path.rpartition("/")
    inside = re.match(r"In '([^']+)'", str(error))
    where = f"{inside.group(1)}: " if inside and inside.group(1) != "zoft_train" else ""
    if group == "hydra/launcher":
        package = next((package for key, package in _PLUGINS.items() if name.startswith(key)), "its Hydra plugin")
        return f"launcher={name} needs a package: pip install {package}"
    part = group.rpartition("/")[2]
    if "/" in group and part in ORDER:
        return f"{where}write `- override /{part}: {name}` under `defaults:` (with `override` and the slash)"
    return f"{where}there is no {group or 'config'} called {name!r}.{did_you_mean(name, error.options or [])}"


def _sentence(error: BaseException) -> str:
    """The innermost reason, without the technical tail (full_key, object_type) that OmegaConf appends."""
    reasons: list[str] = []
    link: BaseException | None = error
    while link is not None:
        lines = [line.strip() for line in str(link).splitlines() if line.strip()]
        key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
        kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
        text = " ".join(kept)
        if text and not any(text in reason for reason in reasons):
            reasons.append(f"{text} (at {key})" if key else text)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; ".join(reasons) or type(error).__name__


def _named(message: str, experiments: Experiments | None) -> str:
    """Registered names of experiments, back to the files they are."""
    for name, file in (experiments.files if experiments else {}).items():
        message = message.replace(f"config/{name}", file).replace(name, file)
    return message
