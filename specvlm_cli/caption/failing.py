"""Notices that a model fails on every video: the same error again and again, and no caption yet."""

from __future__ import annotations

import re

from specvlm_cli.caption.failure import Failure
from specvlm_cli.exits import FatalError
from specvlm_cli.run.ledger import Claim

IN_A_ROW = 5  # videos that fail in the same way before the first caption are the model's fault


class SameFailure:
    """The videos in a row that failed with one error while generating. Numbers in its text do not count."""

    def __init__(self) -> None:
        self._kind = ""
        self._claims: list[Claim] = []

    def add(self, claim: Claim, failure: Failure) -> list[Claim]:
        """Take note of a failure before the first caption; return the videos that are not to blame for theirs."""
        if failure.stage != "generate":  # the model has not seen that video
            return []
        kind = re.sub("[0-9]+", "#", f"{failure.error_type}: {failure.error}")
        if kind != self._kind:
            self._kind, self._claims = kind, []
        self._claims.append(claim)
        return self._claims if len(self._claims) >= IN_A_ROW else []

    @property
    def claims(self) -> list[Claim]:
        """The videos that failed in the same way as the last one."""
        return self._claims

    @staticmethod
    def fatal(failure: Failure) -> FatalError:
        """Return the error that ends the run."""
        return FatalError(
            f"the first {IN_A_ROW} videos all failed in generate with {failure.error_type}: {failure.error}; the "
            "videos are pending again: fix the model or its settings, then start again"
        )
