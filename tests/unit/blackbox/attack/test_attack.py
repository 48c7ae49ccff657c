"""Attacks on classifiers that are only asked: the bound is kept, queries are counted, every method finds its way."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from zoft.blackbox.attack import data
from zoft.blackbox.attack.attack import attack
from zoft.blackbox.attack.ball import Aim, Ball
from zoft.blackbox.attack.classifier import Classifier
from zoft.blackbox.attack.methods import METHODS, AttackMethod
from zoft.blackbox.attack.report import curve, median_interval, summary
from zoft.blackbox.attack.subspaces import ImageSubspace
from zoft.errors import UserError

SHAPE = (1, 6, 6)
WEIGHTS = np.random.default_rng(0).standard_normal((3, 36))
IMAGES = np.random.default_rng(1).random((4, *SHAPE)).astype(np.float32)


def linear() -> Classifier:
    return Classifier(lambda images: images.reshape(len(images), -1) @ WEIGHTS.T, ["a", "b", "c"])


def labels() -> list[int]:
    return linear()(IMAGES).argmax(1).tolist()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_flips_a_linear_classifier(method, norm):
    classifier, radius = linear(), {"linf": 0.3, "l2": 1.8}[norm]
    outcomes = attack(classifier, IMAGES, labels(), norm=norm, radius=radius, budget=400, method=method)
    assert all(o.success for o in outcomes)
    assert classifier.num_queries == sum(o.num_queries for o in outcomes)
    for o in outcomes:
        assert Ball(norm, radius).size(o.adversarial.astype(float) - o.original) <= radius * (1 + 1e-6)
        assert 0 <= o.adversarial.min() <= o.adversarial.max() <= 1
        log_probs = linear()(o.adversarial[None])[0]
        assert (o.after[0], round(o.after[1], 6)) == (log_probs.argmax(), round(float(np.exp(log_probs.max())), 6))
        assert o.before[0] == o.label != o.after[0]


@pytest.mark.parametrize("method", ["flips", "sign"])
@pytest.mark.parametrize("subspace", ["square", "low_frequency"])
def test_subspaces_and_seeds(method, subspace):
    def run(part: slice, seed: int) -> list:
        settings = {"radius": 0.4, "budget": 200, "subspace": subspace, "grid": 3, "loss": "cross_entropy"}
        numbers = range(4)[part]
        return attack(linear(), IMAGES[part], labels()[part], method=method, seed=seed, numbers=numbers, **settings)

    first, again, alone, other = run(slice(4), 0), run(slice(4), 0), run(slice(2, 3), 0), run(slice(4), 1)
    assert [o.adversarial.tobytes() for o in first] == [o.adversarial.tobytes() for o in again]
    assert alone[0].adversarial.tobytes() == first[2].adversarial.tobytes()  # whoever else is attacked
    assert alone[0].num_queries == first[2].num_queries
    assert [o.adversarial.tobytes() for o in first] != [o.adversarial.tobytes() for o in other]


def test_wrong_images_are_skipped_and_targets_reached():
    right = labels()
    wrong = [(right[0] + 1) % 3, *right[1:]]
    outcomes = attack(linear(), IMAGES, wrong, radius=0.5, budget=300, target=2)
    assert (outcomes[0].skipped, outcomes[0].num_queries, outcomes[0].success) == (True, 1, False)
    for o in outcomes[1:]:
        assert o.skipped == (o.label == 2)
        assert o.success != o.skipped
        assert o.after[0] == 2
    assert summary(outcomes)["num_skipped"] == sum(o.skipped for o in outcomes)


def test_the_budget_is_never_passed():
    for method in ("flips", "sign", "minimize"):
        classifier = linear()
        outcomes = attack(classifier, IMAGES, labels(), radius=1e-6, budget=50, method=method)
        assert all(not o.success and o.num_queries <= 50 for o in outcomes)
        assert classifier.num_queries == sum(o.num_queries for o in outcomes) > 4


def test_losses_are_negative_exactly_where_the_label_changes():
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(4), 200))
    for aim in (Aim(1), Aim(1, target=3)):
        assert ((aim.losses(scores) < 0) == aim.reached(scores)).all()
    assert (Aim(1, loss="cross_entropy").losses(scores) == scores[:, 1]).all()
    assert (Aim(1, 3, "cross_entropy").losses(scores) == -scores[:, 3]).all()


def test_low_frequencies_are_those_of_the_cosine_transform():
    space = ImageSubspace("low_frequency", (1, 8, 8), 3)
    z = np.random.default_rng(0).standard_normal((1, 3, 3))
    places, orders = np.arange(8) + 0.5, np.arange(8)  # the orthonormal DCT-II, from its definition
    waves = np.cos(np.pi * orders[:, None] * places / 8) * np.where(orders, 0.5, 8**-0.5)[:, None]
    coefficients = waves @ space.lift(z)[0] @ waves.T
    np.testing.assert_allclose(coefficients[:3, :3] / (8 / 3), z[0], atol=1e-12)
    assert max(abs(coefficients[3:]).max(), abs(coefficients[:, 3:]).max()) < 1e-12


def test_intervals():
    assert median_interval([1.0] * 5) == (-np.inf, np.inf)
    hits = 0
    for seed in range(300):
        low, high = median_interval(sorted(np.random.default_rng(seed).standard_normal(21)))
        hits += low <= 0 <= high
    assert hits >= 0.93 * 300
    outcomes = attack(linear(), IMAGES, labels(), radius=0.4, budget=100)
    rows = curve(outcomes)
    assert (rows[0][0], rows[0][1], rows[-1][1]) == (1, 0.0, 1.0)
    assert all(low <= rate <= high for _, rate, low, high in rows)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Ball("linf", 0.0), "radius must be > 0"),
        (lambda: Ball("linf", 1.0), "lets every image become any other"),
        (lambda: Ball("l1", 1.0), "norm must be one of"),
        (lambda: AttackMethod("flip"), "Did you mean flips"),
        (lambda: AttackMethod("flips", {"eps": 0.1}), "has no eps"),
        (lambda: ImageSubspace("square", SHAPE, 7), "from 1 to 6"),
        (lambda: attack(linear(), IMAGES, labels(), method="sign", budget=10), "budget=10 is too small"),
        (lambda: attack(linear(), IMAGES * 255, labels()), "divide by 255"),
        (lambda: attack(linear(), IMAGES[0], labels()), "must have the shape"),
        (lambda: Classifier(lambda x: np.ones((len(x), 3)), ["a", "b"])(IMAGES), "must give 2 scores"),
        (lambda: Classifier(lambda x: x[:, 0, 0, :2] * np.nan, ["a", "b"])(IMAGES), "not finite"),
        (lambda: Classifier(lambda x: 5 + x[:, 0, 0, :2], ["a", "b"], gives="probabilities")(IMAGES), "sum to 1"),
        (lambda: linear().index_of("d"), "no class 'd'"),
        (lambda: data.fashion_mnist("nowhere"), "there is no folder nowhere"),
    ],
)
def test_what_cannot_be(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_fashion_mnist_files(tmp_path: Path, monkeypatch):
    random = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 8)):
        for name, array in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", random.integers(0, 10, (count,))),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            file = tmp_path / f"{part}-{name}-ubyte.gz"
            file.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    dataset = data.fashion_mnist(str(tmp_path))
    assert dataset.images.shape == (8, 1, 28, 28)
    assert 0 <= dataset.images.min() < dataset.images.max() <= 1
    data._read.cache_clear()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"none")
    with pytest.raises(UserError, match="no gzipped IDX file"):
        data.fashion_mnist(str(tmp_path))
    data._read.cache_clear()
