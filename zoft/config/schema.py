"""The shape of a run: every key there is, its type, its default and what it means. Imports neither Hydra nor torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from zoft.config.ignored import refuse_without_effect
from zoft.config.quantized import check_quantization
from zoft.engines._elsewhere import Elsewhere
from zoft.engines.base import Engine
from zoft.engines.in_place import NO_WAY_BACK
from zoft.errors import UserError, did_you_mean
from zoft.estimators.base import Estimator
from zoft.estimators.nodes import Nodes
from zoft.lm.models.device_map import check_device_map
from zoft.lm.models.load import DTYPES
from zoft.lm.models.peft.base import Peft
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.quantized import QUANTIZATIONS
from zoft.lm.models.trainable.base import NO_ADAPTER, OF_THE_BASE, Trainable
from zoft.lm.objectives._written import ONE_SAMPLE
from zoft.lm.objectives.base import Objective
from zoft.lm.tasks.base import Task
from zoft.optimizers.base import Optimizer
from zoft.step.method import Method, refuse_without_slopes
from zoft.step.shares import check_pipeline, grid_of
from zoft.subspaces.base import Subspace
from zoft.trainer.values import require_budget, require_taken
from zoft.weightings.base import Weighting
from zoft.weights.rounding import ROUNDINGS

PROTOCOLS = ("default", "mezo")
AUTO = ("optimizer.learning_rate", "estimator.eps", "estimator.num_directions")
"""Keys that a run can choose by itself."""
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
TRACKER_MODES = ("online", "offline")
FEW_FOR_ADAM = 10
"""Directions below which Adam does not learn in the full space (SubZero+, table of K)."""


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = did_you_mean(value, known)
        hint = f".{near}" if near.startswith(" Did") else ""
        raise UserError(f"{key} must be one of {', '.join(known)}, got {value!r}{hint}")


@dataclass(kw_only=True)
class ModelConfig:
    """Which pretrained model, and how its weights are held.

    Args:
        name: hub name, local folder, or ``zoft:<asset>`` for one that `zoft fetch` brings.
        revision: branch, tag or commit on the hub; null takes the default branch.
        dtype: of the weights: float32, bfloat16 or float16.
        attn_implementation: eager, sdpa, flash_attention_2, ...; null lets transformers choose.
        quantization: nf4 or int8 (bitsandbytes), int8_torchao, or null: the base's weights in few bits, frozen, below
            an adapter (peft=lora trainable=adapter), or with their scales trained (trainable=scales). A checkpoint that
            is quantised already is loaded as it is.
        device_map: auto or balanced (whole layers on each GPU), a device, or a mapping from names of modules to
            devices; null: the run's one device.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    quantization: str | None = None
    device_map: Any = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("model.name is empty: give a hub name, a folder, or zoft:<asset>")
        _one_of("model.dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            _one_of("model.quantization", self.quantization, QUANTIZATIONS)
        check_device_map(self.device_map)


@dataclass(kw_only=True)
class BudgetConfig:
    """How much training.

    Args:
        queries: forward passes of the objective, clean ones too; training stops when they are used up.
    """

    queries: int = 40_000

    def __post_init__(self) -> None:
        require_budget(self.queries)


@dataclass(kw_only=True)
class PrecisionConfig:
    """How numbers are held.

    Args:
        update: how a step is written into bfloat16 and float16 weights: stochastic (small steps survive on average),
            master (a float32 copy takes them), nearest (they are lost), auto (a master for norms, biases and other
            small tensors, stochastic for the rest; nearest for MeZO's own numbers).
    """

    update: str = "auto"

    def __post_init__(self) -> None:
        _one_of("precision.update", self.update, ROUNDINGS)


@dataclass(kw_only=True)
class TrackerConfig:
    """Where else the metrics go; the run's own metrics.csv and metrics.jsonl are always written.

    Args:
        report_to: trackers by name: wandb, tensorboard, ...; empty for none.
        project: the tracker's project.
        mode: online, or offline (kept in the run's folder until it is synced).
    """

    report_to: list[str] = field(default_factory=list)
    project: str = "zoft"
    mode: str = "online"

    def __post_init__(self) -> None:
        for tracker in self.report_to:
            _one_of("tracker.report_to", tracker, TRACKERS)
        _one_of("tracker.mode", self.mode, TRACKER_MODES)


@dataclass(kw_only=True)
class DiagnosticsConfig:
    """What is measured of the run's estimates beside it; the run itself stays as it is (docs/diagnostics.md).

    Args:
        every: steps from one measurement to the next, the first step included; 0 measures nothing.
        gradient: whether the true gradient is computed by backpropagation, for the cosine to it.
        num_probes: directions that are asked at the same weights, the step's own among them; 0: no more than those.
        eps: radii at which finite differences are compared with the exact derivative; empty: none.
    """

    every: int = 0
    gradient: bool = False
    num_probes: int = 0
    eps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("every", "num_probes"):
            if getattr(self, name) < 0:
                raise UserError(f"diagnostics.{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 < value < float("inf") for value in self.eps):
            raise UserError(f"diagnostics.eps must be > 0 and finite, got {self.eps}")
        given = [name for name in ("gradient", "num_probes", "eps") if getattr(self, name)]
        if given and not self.every:
            raise UserError(
                f"diagnostics.{given[0]} is set, and nothing is measured: choose diagnostics=cheap or full, "
                "or set diagnostics.every"
            )


@dataclass(kw_only=True)
class ZoftConfig:
    """One run.

    Args:
        config: name of the experiment, for the record; chosen by ``config=NAME_OR_PATH``.
        method: name of the method preset that was chosen, for the record.
        protocol: default, or mezo: everything that decides a run's numbers as in MeZO's published code (docs/tasks.md).
        seed: of the directions, the order of the rows and the adapter's first weights.
        output_dir: the run's folder; a run writes there and nowhere else.
        model: which pretrained model.
        task: dataset, template, answers and metric.
        peft: which adapter is put on the model.
        trainable: which weights move.
        subspace: which coordinates of them move, and the law of a direction.
        estimator: where the objective is queried, and what the losses say of each direction.
        weighting: how the slopes along the directions become the coefficients of the estimate.
        optimizer: what step is taken from the estimate.
        engine: how the losses are computed.
        objective: the number that is minimised.
        budget: how much training, in queries.
        precision: how a step is written into weights of few bits.
        tracker: where else the metrics go.
        diagnostics: what is measured of the estimates beside the run.
        trainer: any field of ``transformers.TrainingArguments`` that has no other home, by its own name.
        auto: keys that the run chooses by itself before its first step; set by ``optimizer.learning_rate=auto``.
    """

    config: str = "run"
    method: str | None = None
    protocol: str = "default"
    seed: int = 0
    output_dir: str = "runs/${config}-seed${seed}"
    model: ModelConfig
    task: Task
    peft: Peft
    trainable: Trainable
    subspace: Subspace
    estimator: Estimator
    weighting: Weighting
    optimizer: Optimizer
    engine: Engine
    objective: Objective
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    auto: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chosen = ""  # which method was taken where none was named, and why: a line for the console, and no key
        if not self.output_dir.strip():
            raise UserError("output_dir is empty: give a folder for the run")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be 0 or more and below 2**32 (numpy takes no more), got {self.seed}")
        _one_of("protocol", self.protocol, PROTOCOLS)
        self._check_auto()
        # node directions need no probes of what lies outside of attention, in most models
        if self.subspace.moves_outputs and isinstance(self.peft, Lora) and self.peft.is_free:
            self.peft = replace(self.peft, on="feed_forward")
        if self.protocol == "mezo":
            self._follow_mezo()
        require_taken(self.trainer, "trainer.")
        self.composition.check_budget(self.budget.queries)
        self._check_trainable()
        self._check_engine()
        self._check_elsewhere()
        self._check_gradient()
        check_quantization(self)
        self._check_device_map()
        self._check_outputs()
        self.check_processes(1)
        refuse_without_slopes(self.estimator, self.trainer.get("max_grad_norm"), self.trainer.get("guard"), "trainer.")
        refuse_without_effect(self)

    def _check_auto(self) -> None:
        """What can be chosen, and parts that have it."""
        for key in self.auto:
            _one_of("auto", key, AUTO)
            group, name = key.split(".")
            if not hasattr(getattr(self, group), name):
                raise UserError(f"{key}=auto: {group}={getattr(self, group).name()} has no {name}")
        if "estimator.eps" in self.auto and (why := self._no_radius()):
            raise UserError(
                f"estimator.eps=auto cannot be measured with estimator={self.estimator.name()}: {why}: give a value"
            )
        if self.auto and self.protocol == "mezo":
            raise UserError(
                f"{self.auto[0]}=auto does not go with protocol=mezo, whose numbers are MeZO's: give a value"
            )

    def _no_radius(self) -> str:
        """Why a run cannot measure its radius; empty where it can."""
        if self.subspace.moves_outputs:
            return "its radius is in units of layers' outputs, and 0.1 of them is near the best (docs/nodes.md)"
        return f"subspace={self.subspace.name()} looks at the model first" if self.subspace.observes_at(0) else ""

    def _check_trainable(self) -> None:
        """What is trained must be there, and be saved; regex alone has to see the model's names."""
        trainable, has_adapter = self.trainable.name(), self.peft.name() != "none"
        if trainable == "adapter" and not has_adapter:
            raise UserError(NO_ADAPTER)
        if has_adapter and trainable in ("all", "last_blocks", "norms_and_biases"):
            raise UserError(OF_THE_BASE.format(trainable, ""))
        subtracts = getattr(self.engine, "restore", "") == "subtract"
        if subtracts and not has_adapter and self.model.dtype != "float32":
            raise UserError(NO_WAY_BACK.format(self.model.dtype))

    def _follow_mezo(self) -> None:
        """One switch for MeZO's numbers: its stream of z, its rows and batches."""
        central = self.estimator.name() == "central" and self.estimator.num_directions == 1
        if not central or self.subspace.name() != "full":
            raise UserError(
                "protocol=mezo is MeZO's own step: take method=mezo (estimator=central, one direction, subspace=full), "
                f"not estimator={self.estimator.name()} in subspace={self.subspace.name()}"
            )
        if self.peft.name() == "prefix":
            self.peft = replace(self.peft, layout="mezo")  # type: ignore[call-arg]
        self.estimator = replace(self.estimator, noise="torch_sequential")
        if hasattr(self.task, "protocol"):
            self.task.protocol = "mezo"

    @property
    def composition(self) -> Method:
        """The parts of the method together; refuses those that make no sense with each other."""
        return Method(self.subspace, self.estimator, self.weighting, self.optimizer)

    def settle(self, objective: Objective) -> None:
        """Take the objective that ``auto`` has become; refuses it where the method needs a gradient that it lacks."""
        self.objective = objective
        if objective.name() != "auto":
            self.composition.check_objective(objective)
        self._check_elsewhere()
        self._check_gradient()
        self._check_outputs()
        self.check_processes(int(os.environ.get("WORLD_SIZE", "1")))

    def warnings(self) -> list[str]:
        """Warnings of settings that are valid and probably unintended, a sentence each."""
        trainable, optimizer, q = self.trainable.name(), self.optimizer.name(), self.estimator.num_directions
        many = trainable in ("all", "last_blocks") or (trainable == "auto" and self.peft.name() == "none")
        full, adam = self.subspace.name() == "full", optimizer in ("adam", "adamw")
        warnings = []
        if adam and many and full and q < FEW_FOR_ADAM and not self.estimator.backpropagates:
            warnings.append(
                f"optimizer={optimizer} with num_directions={q} in subspace=full: of so few directions its second "
                "moment measures their noise, not the gradient, and its state is two float32 numbers a weight; raise "
                f"estimator.num_directions to {FEW_FOR_ADAM} or more, train few weights (trainable=norms_and_biases), "
                "take few coordinates (subspace=two_sided), or use optimizer=sgd"
            )
        if optimizer == "muon" and trainable == "norms_and_biases":
            warnings.append(
                "optimizer=muon orthogonalises matrices, and trainable=norms_and_biases trains none: all weights move "
                "at learning_rate * vector_scale; train matrices (trainable=all), or use optimizer=sgd"
            )
        return warnings

    def check_processes(self, world: int) -> None:
        """Refuse a number of processes that cannot divide what they are to divide."""
        parallel = self.trainer.get("parallel", "data")
        grid_of(parallel, self.trainer.get("parallel_directions", 0), world, self.estimator)
        if parallel == "pipeline" and world > 1:
            names = [f"trainer.{n}" for n in ("narrow_last_block", "torch_compile") if self.trainer.get(n)]
            names += ["model.quantization"] if self.model.quantization else []
            check_pipeline(self.composition, self.engine.name(), self.objective, names)

    def _check_gradient(self) -> None:
        """A metric or a reward has none."""
        if self.objective.differentiable:
            return
        estimator = self.estimator.name()
        exact = any(point.derivative for point in self.estimator.points(self.estimator.directions(0, 0)))
        if getattr(self.estimator, "feedback", "") == "exact":
            estimator, exact = f"{estimator} with estimator.feedback=exact", True
        if exact or self.estimator.backpropagates:
            raise UserError(
                f"objective={self.objective.name()} has no gradient, and estimator={estimator} computes one: choose an "
                "estimator that only asks for losses, e.g. estimator=central"
            )
        if self.subspace.observes_at(0) == "gradient":
            raise UserError(
                f"objective={self.objective.name()} has no gradient, and subspace={self.subspace.name()} chooses by one"
            )

    def _check_device_map(self) -> None:
        """One part alone says where weights are."""
        engine = self.engine.name()
        if self.model.device_map is not None and engine in ("llamacpp", "offload", "onnx", "server"):
            raise UserError(
                f"model.device_map={self.model.device_map} says where weights are, and so does engine={engine}: leave "
                "it out, or use engine=auto"
            )

    def _check_outputs(self) -> None:
        """Where layers' outputs move, the objective must be read position by position, as the estimator asks."""
        feedbacks, name = self.objective.feedbacks, self.objective.name()
        if not self.subspace.moves_outputs or name == "auto":
            return
        if self.engine.name() not in ("auto", "nodes"):
            raise UserError(
                f"engine={self.engine.name()} perturbs weights, and subspace=nodes moves layers' outputs: choose "
                "engine=auto"
            )
        if not feedbacks:
            raise UserError(
                f"objective={name} does not say which positions its loss is read from, and subspace=nodes moves those "
                "alone: use objective=options or cross_entropy, or method=mezo"
            )
        wanted = str(getattr(self.estimator, "feedback", "auto"))
        if wanted not in ("auto", "exact", *feedbacks):
            raise UserError(
                f"estimator.feedback={wanted} is not what objective={name} has: choose one of {', '.join(feedbacks)}, "
                "or auto"
            )
        if feedbacks == ("loss",):
            self._take_losses_alone(name)

    def _take_losses_alone(self, name: str) -> None:
        """Node directions of an objective that tells each example's loss and nothing else (a reward)."""
        if getattr(self.estimator, "every", 1) != 1:
            raise UserError(f"objective={name} tells losses alone, which need a probe in every step: use method=nodes")
        if getattr(self.subspace, "positions", "loss") != "loss":
            raise UserError(
                f"subspace.positions={getattr(self.subspace, 'positions', '')}: where texts are written "
                f"(objective={name}), outputs move where their tokens are chosen: use positions=loss"
            )
        if getattr(self.objective, "num_samples", 1) > 1:
            raise UserError(f"objective.num_samples={getattr(self.objective, 'num_samples', 1)}: {ONE_SAMPLE}")
        if isinstance(self.estimator, Nodes):
            self.estimator = replace(self.estimator, feedback="loss")

    def _check_elsewhere(self) -> None:
        """Another runtime is handed an adapter's tensors, and scores tokens of a base that it holds."""
        engine = self.engine
        if not isinstance(engine, Elsewhere):
            return
        engine.check_method(self.composition)
        engine.check_objective(self.objective)
        if self.peft.name() != "lora" or self.trainable.name() not in ("auto", "adapter"):
            raise UserError(
                f"engine={engine.name()} hands adapters to another runtime, and peft={self.peft.name()} "
                f"trainable={self.trainable.name()} trains something else: use peft=lora trainable=adapter, or "
                "engine=auto"
            )
        if self.model.quantization is not None:
            raise UserError(
                f"model.quantization={self.model.quantization} is about weights of this process, and engine="
                f"{engine.name()} runs forwards elsewhere: leave it out ({engine.about_quantization})"
            )
        if engine.holds_base and self.model.attn_implementation is not None:
            raise UserError(
                f"model.attn_implementation={self.model.attn_implementation} is about weights of this process, and "
                f"engine={engine.name()} runs forwards elsewhere: leave it out"
            )
        if self.model.dtype != "float32":
            raise UserError(
                f"model.dtype={self.model.dtype} is about weights of this process, and engine={engine.name()} runs "
                "forwards elsewhere: leave it out, and the adapter is trained in float32"
            )

    def _check_engine(self) -> None:
        """Losses and exact derivatives are computed by different engines."""
        engine = self.engine.name()
        if engine == "auto":
            return
        points = self.estimator.points(self.estimator.directions(0, 0))
        exact = any(point.derivative for point in points)
        if exact and engine != "forward_mode":
            raise UserError(
                f"engine={engine} evaluates losses, and estimator={self.estimator.name()} needs exact derivatives: "
                "choose engine=auto"
            )
        if engine == "forward_mode" and not exact:
            raise UserError(
                f"engine=forward_mode computes exact derivatives, and estimator={self.estimator.name()} "
                f"needs {'losses' if points else 'a backward pass'}: choose engine=auto, or estimator=forward_gradient"
            )
