"""A network that takes memory until it is stopped."""

import time
from typing import Any

from parts import candidate


def _build(config: Any, rngs: Any) -> Any:
    eaten = []
    while True:
        eaten.append(b"x" * 2**26)
        time.sleep(0.05)


CANDIDATES = (candidate("eater-cpu-all", build=_build),)
