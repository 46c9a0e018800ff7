"""The tokens that a draft may guess, and its scores of them: all that it shares with its target, or a chosen few.

An LM head is as wide as the vocabulary, and of a small draft it is much of the work; captions use few of its rows.
VocabTrim (arXiv 2506.22694, section 3) keeps the rows of the tokens that are used and needs no training: what is left
out is never guessed, and the target, which checks over all tokens, writes it all the same. Which tokens are worth
keeping is not known here; see `token_counts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from specvlm.errors import ConfigError


class DraftVocabulary:
    """What a draft guesses from, over an LM head of its own or over its target's.

    Attributes:
        width: Tokens that draft and target share.
        size: M, tokens that may be guessed.
        ids: int64 [M], these tokens, ascending, where logits come out; None: tokens 0 to M - 1.
    """

    def __init__(self, head: nn.Module, width: int, ids: Sequence[int] | None = None) -> None:
        """Copy the rows of `ids`, once.

        Args:
            head: The LM head, a linear layer with or without a bias; tied to the embeddings or not.
            width: Tokens that draft and target share; rows beyond them are padding.
            ids: The tokens to keep, in any order; None: all of them.

        Raises:
            ConfigError: There is nothing to keep, a token is not among the shared ones, or the head is quantised.
        """
        self._head, self.width = head, width
        self.size = width
        self.ids: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        kept = None if ids is None else sorted(set(ids))
        if kept is not None and kept != list(range(width)):
            self._trim(head, kept)

    def _trim(self, head: nn.Module, kept: Sequence[int]) -> None:
        if not kept or not 0 <= kept[0] <= kept[-1] < self.width:
            told = f"token {kept[0] if kept[0] < 0 else kept[-1]}" if kept else "no token"
            raise ConfigError(
                f"the draft vocabulary holds {told}, the draft has tokens 0 to {self.width - 1}; "
                "choose some of these"
            )
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        if not weight.is_floating_point():
            raise ConfigError(
                f"the draft's LM head is quantised ({weight.dtype}), so its rows cannot be chosen from; "
                "leave the draft vocabulary as it is, or load the draft unquantised"
            )
        ids = torch.tensor(kept, device=weight.device)
        self.size, self.ids = len(kept), ids
        self._weight = weight.detach().index_select(0, ids)
        bias: torch.Tensor | None = getattr(head, "bias", None)
        self._bias = None if bias is None else bias.detach().index_select(0, ids)

    def over(self, ids: Sequence[int] | None) -> DraftVocabulary:
        """Another choice of tokens over the same LM head; errors are those of the constructor."""
        return DraftVocabulary(self._head, self.width, ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, n, hidden], where the LM head is -> logits float32 [B, n, M]."""
        if self._weight is None:
            out: torch.Tensor = self._head(hidden)
            return out[..., : self.width].float()
        return functional.linear(hidden, self._weight, self._bias).float()
