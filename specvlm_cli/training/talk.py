"""What a person sees of a training, on stderr: a bar on a terminal, elsewhere a line every 30 s; messages; the end.

Text from outside is cleaned, never read as markup. It knows figures, not how they came about.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from specvlm.training.progress import Measures
from specvlm.training.progress import Progress as Standing
from specvlm.words import counted
from specvlm_cli.console.live import every
from specvlm_cli.console.safe_text import caption_line, short
from specvlm_cli.console.streams import escaping
from specvlm_cli.console.voice import LOG_EVERY_S, ProgressName, Voice
from specvlm_cli.console.words import duration, rate
from specvlm_cli.training.captions import LeftOut

_LATELY = 64  # samples whose mean loss is shown
_PACE_S = 120.0


class Speaker(Voice):
    """Speaks to one person, and to a log file where one is given; of several processes only that of rank 0 does.

    It is the loop's watcher and the listener of its samples.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        progress: ProgressName = "auto",
        log_file: Path | None = None,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`silent`: another process speaks."""
        super().__init__(quiet=quiet, verbose=verbose, progress=progress, log_file=log_file)
        self._silent, self._clock = silent, clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._step, self._total = 0, 0
        self._lately: deque[Measures] = deque(maxlen=_LATELY)
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._steps: deque[tuple[float, int]] = deque()
        self._best: tuple[float, int] | None = None
        self._last: float | None = None
        self._doing = ""
        self._asked_held_out = False  # some were decoded, or could not be

    def _show(self, cleaned: str) -> None:
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(Text(cleaned))
        else:
            super()._show(cleaned)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Show progress while the block runs."""
        with ExitStack() as stack:
            if self._progress == "bar":
                words = TextColumn("{task.description}", markup=False)
                self._bar = stack.enter_context(
                    Progress(BarColumn(24), words, console=self._console, transient=True)
                )
                self._task = self._bar.add_task("", total=None)
                stack.callback(self._end_bar)
                stack.enter_context(escaping())  # rich would read escape sequences of libraries
            if self._progress == "log" or self._log is not None:
                stack.enter_context(every(LOG_EVERY_S, self._tell_line))
            yield

    def _end_bar(self) -> None:
        self._bar = None

    def _tell_line(self) -> None:
        self._tell_standing(self.line(), shown=self._progress == "log")

    def _refresh(self) -> None:
        if self._bar is not None:
            words = short(self.line(), max(self._console.width - 28, 20))
            self._bar.update(self._task, completed=self._step, total=max(self._total, 1), description=words)

    def line(self) -> str:
        """Return how things stand, as one line."""
        pieces = [f"step {self._step:,}/{self._total:,}"]
        if self._doing:
            pieces.append(self._doing)
        if self._lately:
            count = len(self._lately)
            pieces.append(f"loss {sum(one.loss for one in self._lately) / count:.3f}")
            pieces.append(f"right {100 * sum(one.right for one in self._lately) / count:.0f} %")
        if self._last is not None:
            best = "" if self._best is None else f" (best {self._best[0]:.2f} at {self._best[1]:,})"
            pieces.append(f"held-out {self._last:.2f} accepted{best}")
        (since_s, before), (_, now) = self._samples[0], self._samples[-1]
        if now > before:
            pieces.append(f"{rate((now - before) / max(self._clock() - since_s, 1e-6))} samples/s")
        if len(self._steps) > 1 and self._steps[-1][1] > self._steps[0][1]:
            (first_s, first), (last_s, last) = self._steps[0], self._steps[-1]
            left_s = (self._total - self._step) * (last_s - first_s) / (last - first)
            pieces.append(f"{duration(left_s)} left")
        return ", ".join(pieces)

    # --- the loop's watcher ---

    def began(self, step: int, total: int, progress: Standing) -> None:
        """See `specvlm.training.trainer.Watcher`."""
        self._step, self._total = step, total
        if step:
            self.note(f"going on from step {step:,} of {total:,}")
        for entry in progress.log:
            self._take(entry)

    def learned(self, one: Measures | None) -> None:
        """See `specvlm.training.trainer.Watcher`."""
        self._doing = ""
        if one is not None:
            self._lately.append(one)
            self._samples.append((self._clock(), self._samples[-1][1] + 1))
            while len(self._samples) > 2 and self._clock() - self._samples[0][0] > _PACE_S:
                self._samples.popleft()
        self._refresh()

    def stepped(self, step: int, progress: Standing) -> None:
        """See `specvlm.training.trainer.Watcher`."""
        self._step = step
        self._steps.append((self._clock(), step))
        while len(self._steps) > 2 and self._clock() - self._steps[0][0] > 5 * _PACE_S:
            self._steps.popleft()
        self._refresh()
        if self._verbose:
            self.note(self.line())

    def evaluating(self) -> None:
        """See `specvlm.training.trainer.Watcher`."""
        self._asked_held_out = False
        self._doing = "decoding held-out videos"
        self._refresh()

    def evaluated(self, entry: dict[str, Any]) -> None:
        """See `specvlm.training.trainer.Watcher`."""
        self._doing = ""
        self._take(entry)
        figure = entry["mean_accepted_tokens"]
        if figure is None and self._asked_held_out:
            self.warn(
                f"step {entry['step']:,}: none of the held-out videos could be used, so it is not known how good this "
                "head is; give others with --held-out, for another head"
            )
        elif figure is not None:
            kept = ", the best so far" if self._best == (figure, entry["step"]) else ""
            loss = "" if entry["loss"] is None else f", loss {entry['loss']:.3f}"
            self.note(
                f"step {entry['step']:,}: {figure:.2f} tokens accepted a round on held-out videos{loss}{kept}"
            )
        self._refresh()

    def _take(self, entry: dict[str, Any]) -> None:
        self._last = figure = entry["mean_accepted_tokens"]
        if figure is not None and (self._best is None or figure >= self._best[0]):
            self._best = (figure, entry["step"])

    # --- the listener of samples ---

    def left_out(self, left: LeftOut) -> None:
        """See `specvlm_cli.training.asking.SampleListener`."""
        why = left.failure
        self.warn(f"left out: {left.name}: {why.error} ({why.stage}, {why.error_type})")

    def captioned(self, name: str, text: str) -> None:
        """See `specvlm_cli.training.asking.SampleListener`."""
        if self._verbose:
            self.note(f"{name}: {caption_line(text)}")

    def measured(self, videos: int, of: int) -> None:
        """See `specvlm_cli.training.asking.SampleListener`."""
        self._asked_held_out = True
        self._doing = f"decoding held-out videos, {videos} of {of}"
        self._refresh()


def ending(outcome: Any) -> str:
    """Return how a training ended, as one line."""
    if outcome.stopped == "locked":
        return "skipped: another start is at work there"
    of = f" of {outcome.total_steps:,}" if outcome.steps <= outcome.total_steps else ""
    words = [f"{counted(outcome.steps, 'step')}{of} done in {duration(outcome.wall_s)}"]
    if outcome.best is not None and outcome.best["mean_accepted_tokens"] is not None:
        words.append(
            f"best head: {outcome.best['mean_accepted_tokens']:.2f} tokens accepted a round on held-out videos, "
            f"at step {outcome.best['step']:,}"
        )
    if outcome.left_out:
        words.append(f"{counted(outcome.left_out, 'sample')} left out")
    if outcome.stopped is not None:
        words.append(f"stopped by {outcome.stopped}, start again to resume")
    return "; ".join(words)
