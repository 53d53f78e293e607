"""Motion tokens: exact rewrites, and what the prediction of a token may know."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import Values, check_rewrites, compiled_call, deal, draw

from jaxbench.models import motionlm
from jaxbench.program import make_batch

NAMED = {candidate.name: candidate for candidate in motionlm.CANDIDATES}


def pad_output(values: Values, paths: Any) -> Values:
    """Adds zero columns to the output, up to a multiple of 256."""
    dealt = deal(values, paths)
    kernel, bias = dealt[("out", "kernel")], dealt[("out", "bias")]
    missing = -len(bias) % motionlm.TILE
    dealt[("out", "kernel")] = np.pad(kernel, ((0, 0), (0, missing)))
    dealt[("out", "bias")] = np.pad(bias, (0, missing))
    return dealt


def test_exact_rewrites_agree_in_value_and_gradient() -> None:
    exact = [c for c in motionlm.CANDIDATES if c.size == "cpu" and c.validity == "T0"]
    base = NAMED["motionlm-cpu-base"]
    check_rewrites(motionlm, base, [c for c in exact if c.config.codes == "exact"])
    # No gradient reaches a masked row, so a padded gradient is the gradient of the padded.
    check_rewrites(motionlm, base, [NAMED["motionlm-cpu-padded"]], carry=pad_output)


def test_mask_of_two_agents_and_two_steps() -> None:
    joint = motionlm.motion_mask(2, 2, joint=True)[0]
    np.testing.assert_array_equal(joint, [[1, 1, 0, 0], [1, 1, 0, 0], [1] * 4, [1] * 4])
    own = motionlm.motion_mask(2, 2, joint=False)[0]
    np.testing.assert_array_equal(own, [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("change", ["base", "factorised", "marginal"])
def test_a_token_tells_only_later_steps(change: str) -> None:
    candidate = NAMED[f"motionlm-cpu-{change}"]
    batch = make_batch(candidate.workload, jax.random.key(0))
    # Step 1 of agent 0 changes.
    tokens = jnp.zeros((2, 2, 4), jnp.int32).at[1, 0, 1].set(5)
    scene = [jnp.tile(batch[name][:1], (2, 1, 1, 1)) for name in ("history", "lanes")]
    call = compiled_call(candidate, draw(candidate))
    logits = call(*scene, tokens)
    changed = np.any(np.asarray(logits[0] != logits[1]), axis=-1)
    np.testing.assert_array_equal(changed[:2], False)
    np.testing.assert_array_equal(changed[2:, 0], True)
    np.testing.assert_array_equal(changed[2:, 1], change != "marginal")
