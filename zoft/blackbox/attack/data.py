"""Real images with a small classifier that is trained on the spot: scikit-learn's digits, and Fashion-MNIST."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoft.blackbox.attack.classifier import Classifier
from zoft.errors import UserError
from zoft.utils.lazy import torch
from zoft.utils.random_state import global_random_state_kept

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the files."""

_FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FASHION_TRAIN = 20_000
_DIGITS_TEST = 397  # the last ones: other writers than the first
_SEED = 0  # of the classifier: attacks of any seed meet the same one


@dataclass(frozen=True)
class Setting:
    """Something to attack.

    Args:
        classifier: what is asked.
        images: float32 [n, c, h, w] in [0, 1], which it was not trained on.
        labels: the right classes [n].
        about: a line on the classifier.
    """

    classifier: Classifier
    images: np.ndarray
    labels: np.ndarray
    about: str


def digits() -> Setting:
    """Handwritten digits of 8 x 8 and an MLP with 64 hidden units; 2 CPU seconds.

    Raises:
        UserError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("data=digits comes with scikit-learn, which is not installed: pip install 'zoft[attack]'")
    from sklearn.datasets import load_digits

    dataset = load_digits()
    images = (dataset.images / 16).astype(np.float32)[:, None]
    labels = dataset.target.astype(np.int64)
    train, test = slice(None, -_DIGITS_TEST), slice(-_DIGITS_TEST, None)
    net = trained(lambda: mlp(64, 10), images[train], labels[train], epochs=60, seed=_SEED)
    classifier = Classifier(net, [str(digit) for digit in range(10)])
    return _setting("digits, MLP of 64 hidden units", classifier, images[test], labels[test])


def fashion_mnist(folder: str | None = None) -> Setting:
    """Fashion-MNIST and a CNN of 105,866 weights after three epochs on 20,000 images; 15 CPU seconds.

    Args:
        folder: with the four gzipped files of the data set; where Debian's package puts them if left out.

    Raises:
        UserError: they are not there, or are something else.
    """
    where = Path(folder or FASHION_FOLDER)
    if not where.is_dir():
        raise UserError(
            f"there is no folder {where} with Fashion-MNIST: apt-get install dataset-fashion-mnist, or give "
            "folder=, with train-images-idx3-ubyte.gz and the other three files"
        )
    x, y = (_read(where / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    x_test, y_test = (_read(where / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    images = (x[:_FASHION_TRAIN, None] / 255).astype(np.float32)
    net = trained(lambda: cnn(10), images, y[:_FASHION_TRAIN].astype(np.int64), epochs=3, seed=_SEED)
    test = (x_test[:, None] / 255).astype(np.float32)
    classifier = Classifier(net, _FASHION)
    return _setting("Fashion-MNIST, CNN of 105,866 weights", classifier, test, y_test.astype(np.int64))


def _setting(what: str, classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> Setting:
    right = (classifier(images).argmax(1) == labels).mean()
    classifier.num_queries = 0  # a look at its accuracy is no part of an attack
    return Setting(classifier, images, labels, f"{what}: {100 * right:.1f} % of {len(labels):,} test images right")


@functools.cache
def _read(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type, the number of dimensions, their sizes (big-endian), the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
        assert raw[:3] == b"\0\0\x08"
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: Fashion-MNIST has four gzipped files") from None
    except (OSError, EOFError, AssertionError, ValueError, IndexError):
        raise UserError(f"{path} is no gzipped IDX file of bytes, as Fashion-MNIST has them") from None


# ---- Small networks that are trained on the spot, in seconds, to have something to attack ----------------------------

_BATCH = 64
_LEARNING_RATE = 1e-3


def mlp(num_inputs: int, num_classes: int) -> torch.nn.Module:
    """One hidden layer of 64 units."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(num_inputs, 64), torch.nn.ReLU(), torch.nn.Linear(64, num_classes)
    )


def cnn(num_classes: int) -> torch.nn.Module:
    """Two convolutions with pooling and one hidden layer, for grey images of 28 x 28: 105,866 weights."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def trained(
    make: Callable[[], torch.nn.Module], images: np.ndarray, labels: np.ndarray, *, epochs: int, seed: int
) -> torch.nn.Module:
    """A network after some epochs of Adam on the cross-entropy; the global random generators stay as they are.

    Args:
        make: builds the network.
        images: float32 [n, c, h, w] in [0, 1].
        labels: int64 [n].
        epochs: times through the images.
        seed: of the first weights and of the order of the images.

    Returns:
        The network, ready to be asked.
    """
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    with global_random_state_kept():
        torch.manual_seed(seed)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(_BATCH):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval().requires_grad_(False)
