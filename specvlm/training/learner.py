"""The weights that learn: the head, its float32 masters, AdamW, the gradient of a step. Knows no data and no files.

A sample's gradient is added only when all of it is there, so a sample that fails half-way leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from specvlm.drafts.head_model import HeadModel
from specvlm.errors import TrainingError
from specvlm.training.ranks import Ranks
from specvlm.training.settings import BETAS, TrainingSettings

_HEAD, _MEAN, _SQUARE = "head.", "mean.", "square."  # what a state's tensors are, before their names


class Learner:
    """A head in training.

    Attributes:
        head: The weights that compute, in the number format of the target.
        steps: Steps that were taken.
    """

    def __init__(self, head: HeadModel, settings: TrainingSettings, ranks: Ranks) -> None:
        """Begin with the weights of `head`."""
        self.head, self.steps = head, 0
        self._settings, self._ranks = settings, ranks
        named = [(name, weight) for name, weight in head.named_parameters() if weight.requires_grad]
        self._names = [name for name, _ in named]
        self._weights = [weight for _, weight in named]
        self._masters = [_master(weight) for weight in self._weights]
        self._gradient = [torch.zeros_like(master) for master in self._masters]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0, foreach=False
        )

    def gradient(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of one sample, by weight; None: it does not depend on that weight."""
        return list(torch.autograd.grad(loss, self._weights, allow_unused=True))

    def add(self, gradient: Sequence[torch.Tensor | None]) -> None:
        """Add a sample's gradient to that of the step."""
        for sum_, part in zip(self._gradient, gradient, strict=True):
            if part is not None:
                sum_ += part

    def forget(self) -> None:
        """Forget the gradient of a step that is not taken."""
        for sum_ in self._gradient:
            sum_.zero_()

    def step(self, samples: int) -> float | None:
        """Take a step with the mean gradient of `samples`, of all processes together; every process calls it.

        Without any sample the weights stay as they are.

        Returns:
            The gradient's norm before clipping; None without samples.

        Raises:
            TrainingError: The gradient, or a weight after the step, is not finite; what is here is of no use then.
        """
        if not samples:
            self.steps += 1
            return None
        self._ranks.add(self._gradient)
        for sum_, master in zip(self._gradient, self._masters, strict=True):
            master.grad = sum_.div_(samples)
        most = self._settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self._masters, float("inf") if most is None else most)
        if not math.isfinite(norm):
            raise self._refused(f"the norm of the gradient is {float(norm)}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.forget()
        if not all(bool(torch.isfinite(master).all()) for master in self._masters):
            raise self._refused("a weight is not finite")
        self._spread()
        self.steps += 1
        return float(norm)

    def _refused(self, reason: str) -> TrainingError:
        return TrainingError(
            f"step {self.steps + 1}: {reason}; give a lower --learning-rate, or --clip-norm 0.5, in another folder"
        )

    @torch.no_grad()
    def _spread(self) -> None:
        """Round the masters into the weights that compute."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight:
                weight.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, besides `steps`; on the CPU or not, in float32, not copied."""
        found = {}
        for name, master in zip(self._names, self._masters, strict=True):
            moments = self._optimizer.state.get(master, {})
            found[_HEAD + name] = master.detach()
            found[_MEAN + name] = moments.get("exp_avg", torch.zeros_like(master))
            found[_SQUARE + name] = moments.get("exp_avg_sq", torch.zeros_like(master))
        taken = [self._optimizer.state[master]["step"] for master in self._masters if self._optimizer.state]
        found["updates"] = taken[0].clone() if taken else torch.zeros(())
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Continue from what `state` gave.

        Raises:
            KeyError: It is that of another head.
        """
        self.steps = steps
        for name, master in zip(self._names, self._masters, strict=True):
            master.copy_(state[_HEAD + name])
            if float(state["updates"]):
                self._optimizer.state[master] = {
                    "step": state["updates"].clone().cpu(),
                    "exp_avg": state[_MEAN + name].to(master.device, copy=True),
                    "exp_avg_sq": state[_SQUARE + name].to(master.device, copy=True),
                }
        self._spread()

    @torch.no_grad()
    def copy_to(self, head: HeadModel) -> None:
        """Put the weights as they are now into another head of the same kind."""
        there = dict(head.named_parameters())
        for name, master in zip(self._names, self._masters, strict=True):
            there[name].copy_(master)


def _master(weight: torch.Tensor) -> torch.nn.Parameter:
    """A weight in float32, itself where it is that already."""
    if weight.dtype == torch.float32 and isinstance(weight, torch.nn.Parameter):
        return weight
    return torch.nn.Parameter(weight.detach().float().clone())
