"""Networks that take their process with them."""

import os
import signal
from typing import Any

from parts import candidate


def _abort(config: Any, rngs: Any) -> Any:
    os.abort()


def _segfault(config: Any, rngs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


CANDIDATES = (
    candidate("crash-cpu-abort", build=_abort),
    candidate("crash-cpu-segfault", build=_segfault),
)
