"""Settings of a training: frozen dataclasses with their defaults and range checks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from specvlm.config import whole, within

BETAS = (0.9, 0.95)  # of AdamW; SpecVLM, arXiv 2509.11815, section 4


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the trained weights depend on, besides head, loss and data; SpecVLM, arXiv 2509.11815, section 4.

    AdamW without weight decay and without warm-up, at one rate throughout.

    Attributes:
        learning_rate: Of AdamW.
        accumulate: Samples of a step, of all processes together; the last step of an epoch may have fewer.
        clip_norm: Largest norm of a step's gradient, which is scaled down to it; None: not clipped, as in the paper.
        seed: Of the first weights, the order of samples, the noise of the compressor and the held-out videos.
    """

    learning_rate: float = 8e-5
    accumulate: int = 8
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        within("learning_rate", self.learning_rate, 1e-9, 1.0, "give a rate between 1e-9 and 1")
        whole("accumulate", self.accumulate)
        within("accumulate", self.accumulate, 1, 1 << 20, "give 1 to 1048576 samples a step")
        if self.clip_norm is not None:
            within("clip_norm", self.clip_norm, 1e-9, 1e9, "give a norm above 0, e.g. 0.5")
        whole("seed", self.seed)
        within("seed", self.seed, 0, (1 << 63) - 1, "give 0 to 2**63 - 1")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a training runs, and what is done on its way. The weights after a step do not depend on it.

    Attributes:
        epochs: How often each sample is seen.
        max_steps: Most steps; None: as many as the epochs have.
        evaluate_every: Steps between two looks at the held-out videos.
        checkpoint_steps: Steps between two checkpoints; None: time decides.
        checkpoint_s: Time between two checkpoints, where no number of steps is given.
    """

    epochs: int = 1
    max_steps: int | None = None
    evaluate_every: int = 100
    checkpoint_steps: int | None = None
    checkpoint_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "evaluate_every", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value)
                within(name, value, 1, 1 << 40, "give 1 or more")
        within("checkpoint_s", self.checkpoint_s, 0.0, 1e9, "give a time, e.g. 5m")
