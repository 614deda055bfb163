"""Texts read once: a tokenizer that remembers what it has read.

A rollout asks for the tokens of a prompt several times: it checks the text, rules its duration, and encodes it for the
policy and for what the policy is compared with. Tokens depend on nothing but the arguments, so each is computed once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rlhf_mel.speech.text import TimedTokenizer, Tokenizer

TEXTS = 4096
"""How many results of each method are kept; the longest unused go first."""


class CachedTokenizer:
    """`tokenizer`, each of whose methods is called once with the same arguments. What raises is not remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = tokenizer.name
        self._tokens = lru_cache(TEXTS)(lambda *arguments: tuple(tokenizer(*arguments)))
        self._prompt_tokens = lru_cache(TEXTS)(lambda *arguments: tuple(tokenizer.prompt(*arguments)))
        self._spoken_length = lru_cache(TEXTS)(tokenizer.spoken_length)
        self._timed = tokenizer if isinstance(tokenizer, TimedTokenizer) and tokenizer.draws_timing else None
        self._drawn = lru_cache(TEXTS)(self._draw)

    @property
    def draws_timing(self) -> bool:
        """See `TimedTokenizer`; of others no."""
        return self._timed is not None

    def drawn(self, seed: int) -> CachedTokenizer:
        """See `TimedTokenizer`; others read the same whatever the seed."""
        return self._drawn(seed)

    def _draw(self, seed: int) -> CachedTokenizer:
        return self if self._timed is None else CachedTokenizer(self._timed.drawn(seed))

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """See `Tokenizer`."""
        return list(self._tokens(text, frames))

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """See `Tokenizer`."""
        return list(self._prompt_tokens(reference_text, text, reference_frames, frames))

    def spoken_length(self, text: str) -> float:
        """See `Tokenizer`."""
        return self._spoken_length(text)


def cached(tokenizer: Tokenizer) -> CachedTokenizer:
    """The `CachedTokenizer` of `tokenizer`: always the same one for the same object."""
    hashable: Any = tokenizer  # a protocol cannot say that it is
    return _cached(hashable)


@lru_cache(maxsize=16)
def _cached(tokenizer: Tokenizer) -> CachedTokenizer:
    return CachedTokenizer(tokenizer)
