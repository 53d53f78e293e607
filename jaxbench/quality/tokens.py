"""A generated language for decoders: short programs whose later tokens depend on earlier ones."""

from __future__ import annotations

import numpy as np

_STATES = 24  # of the grammar
_WORDS = 8  # that a state may speak
_COPY = 0.15  # chance that a phrase seen before in the sequence comes again
_PHRASE = (3, 9)  # its length
_FAR = 2 * _PHRASE[1]  # tokens before anything is repeated


def draw_tokens(seeds: np.ndarray, length: int, *, vocab_size: int) -> np.ndarray:
    """Draws as many sequences as there are seeds, which together are the seed of all.

    A hidden Markov chain with phrases repeated from far back: a state speaks a few tokens of its
    own, so a short memory helps; a repeated phrase is certain after its first tokens, so a long one
    does too.

    Returns:
      int32 [len(seeds), length], each below `vocab_size`.
    """
    grammar = np.random.default_rng(7)
    moves = grammar.dirichlet(np.full(_STATES, 0.1), _STATES).cumsum(axis=1)
    words = grammar.integers(0, vocab_size, (_STATES, _WORDS))
    generator, num = np.random.default_rng(np.asarray(seeds, np.uint64)), len(seeds)
    rows, tokens = np.arange(num), np.zeros((num, length), np.int32)
    state, source, left = (np.zeros(num, np.int64) for _ in range(3))
    for at in range(length):
        if at > _FAR:
            begins = (left == 0) & (generator.random(num) < _COPY)
            left = np.where(begins, generator.integers(*_PHRASE, num), left)
            start = (generator.random(num) * (at - left)).astype(np.int64)
            source = np.where(begins, start, source)
        drawn = (moves[state] < generator.random(num)[:, None]).sum(axis=1)
        repeats = left > 0
        state = np.where(repeats, state, np.minimum(drawn, _STATES - 1))
        spoken = words[state, generator.integers(0, _WORDS, num)]
        tokens[:, at] = np.where(repeats, tokens[rows, source], spoken)
        source, left = source + repeats, left - repeats
    return tokens
