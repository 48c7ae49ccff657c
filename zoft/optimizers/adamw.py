"""Adam with the decay that torch's AdamW has: the first-order reference's optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.optimizers.adam import Adam


@dataclass
class AdamW(Adam):
    """Adam with weight_decay=0.01: the rule and the defaults of torch.optim.AdamW.

    ``optimizer=adam`` has the same rule, its decay decoupled too; what is left out there comes from the training
    arguments. With ``estimator=backprop`` this is first-order fine-tuning in the same harness.

    References: Loshchilov & Hutter 2019, Algorithm 2.
    """

    weight_decay: float | None = 0.01
