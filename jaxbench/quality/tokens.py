"""A generated language for decoders: short programs whose later tokens depend on earlier ones."""

from __future__ import annotations

import numpy as np

_STATES = 24  # of the grammar
_COPY = 0.15  # chance that a phrase seen before in the sequence comes again
_PHRASE = (3, 9)  # its length


def draw_tokens(seeds: np.ndarray, length: int, *, vocab_size: int) -> np.ndarray:
    """Draws sequences, one a seed: a hidden Markov chain with phrases repeated from far back.

    A state speaks a few tokens of its own, so a short memory helps; a repeated phrase is certain
    after its first tokens, so a long one does too.

    Returns:
      int32 [len(seeds), length], each below `vocab_size`.
    """
    grammar = np.random.default_rng(7)
    moves = grammar.dirichlet(np.full(_STATES, 0.1), _STATES).cumsum(axis=1)
    words = grammar.integers(0, vocab_size, (_STATES, 8))
    return np.stack([_sequence(int(seed), length, moves, words) for seed in seeds])


def _sequence(seed: int, length: int, moves: np.ndarray, words: np.ndarray) -> np.ndarray:
    generator, tokens, state = np.random.default_rng(seed), [], 0
    while len(tokens) < length:
        if len(tokens) > 2 * _PHRASE[1] and generator.random() < _COPY:
            size = int(generator.integers(*_PHRASE))
            start = int(generator.integers(0, len(tokens) - size))
            tokens += tokens[start : start + size]
        state = int(np.searchsorted(moves[state], generator.random()))
        state = min(state, len(moves) - 1)
        tokens.append(int(words[state, generator.integers(0, words.shape[1])]))
    return np.asarray(tokens[:length], np.int32)
