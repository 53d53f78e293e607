"""A network that is never done being built."""

import time
from typing import Any

from parts import candidate


def _build(config: Any, rngs: Any) -> Any:
    while True:
        time.sleep(0.1)


CANDIDATES = (candidate("hang-cpu-forever", build=_build),)
