"""Small networks that are trained on the spot, in seconds, to have something to attack."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zoft.lazy import torch
from zoft.random_state import global_random_state_kept

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
