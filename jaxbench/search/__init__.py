"""The search: faster networks in a space of equally valid ones, cheap looks first.

A network's analytic bounds come first, then the sum of its blocks' prices, then whole compiles of
the front; measurements and verdicts on a driving task are for what is left.

    space.py     what may change, and what must stay equal
    block.py     what networks are made of
    server.py    the space in a worker: a point's network, its blocks, what it violates
    points.py    what that worker said, kept
    blockstep.py, prices.py   a block through the compilers, once
    compose.py   steps from blocks, and the error of that
    pricing.py   a network's price on each target, composed or compiled whole
    trials.py    Optuna's journal: resumed, shared, nothing lost or done twice
    front.py     Pareto sets, regret
    engine.py    the whole line
"""

from jaxbench.search.block import Array, Block
from jaxbench.search.space import Band, Choice, Space, choices_from_variants

__all__ = ["Array", "Band", "Block", "Choice", "Space", "choices_from_variants"]
