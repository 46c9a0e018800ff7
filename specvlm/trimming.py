"""A draft's vocabulary that is learned on the way: trimmed once the captions so far tell which tokens they use.

Between captions alone, and never a caption's text. It knows no files; earlier captions are texts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from specvlm.captioner import Captioner
from specvlm.costs import CostStore
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.kept_tokens import Choosing, MostUsed, check_size, count_tokens, most_used, unseen_share
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.sampling import id_list

# Of the tokens to come, so many may be left out because no caption has used them yet. Each of them spoils a round.
MOST_UNSEEN = 0.01


def guess_from(captioner: Captioner, ids: Sequence[int]) -> None:
    """Have a captioner's draft guess from these tokens alone, from its next caption on.

    Raises:
        ConfigError: A token is none of the draft's, or its LM head is quantised.
    """
    draft = captioner.draft
    assert isinstance(draft, (SmallModelDraft, HeadDraft))
    trimmed = copy.copy(draft)
    trimmed.guessable = draft.guessable.over(ids)
    trimmed.vocabulary = trimmed.guessable.size
    captioner.draft = trimmed
    if trimmed.vocabulary != draft.vocabulary:  # what was learned of the other one's costs does not hold
        captioner.costs = CostStore()


class Trimming:
    """Counts the tokens of captions and trims the draft of the captioner that makes them.

    Attributes:
        trimmed: The draft guesses from some tokens alone by now.
    """

    def __init__(self, captioner: Captioner, wanted: MostUsed) -> None:
        """Count in the texts that are there; where they tell enough, trim at once.

        Raises:
            ConfigError: The draft has not as many tokens.
        """
        draft = captioner.draft
        assert isinstance(draft, (SmallModelDraft, HeadDraft))
        self._captioner, self._size = captioner, wanted.size
        ends = id_list(captioner.generation_config.eos_token_id)
        self._by = Choosing(captioner.processor.tokenizer, draft.guessable.width, ends)
        check_size(wanted.size, self._by)
        self._counts, _ = count_tokens(self._by.tokenizer, wanted.texts)
        self._heard = 0
        self.trimmed = False
        self._trim()

    def hear(self, tokens: Iterable[int]) -> None:
        """Count a caption. Each time that their number has doubled, choose again."""
        self._counts.update(tokens)
        self._heard += 1
        if self._heard & (self._heard - 1) == 0:
            self._trim()

    def _trim(self) -> None:
        if unseen_share(self._counts, self._size, self._by) <= MOST_UNSEEN:
            guess_from(self._captioner, most_used(self._counts, self._size, self._by))
            self.trimmed = True
