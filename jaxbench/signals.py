"""The four signals about a step's time, never mixed, and by which factor each may be wrong."""

from __future__ import annotations

from collections.abc import Mapping

SIGNALS = ("model", "hlo", "compiler", "measured")

# hlo, compiler: nine of ten published steps lie within the factor about the median of their family
# on their chip (benchmarks/fit_intervals.py, published.toml): a chip's own bias cancels
# between rivals. measured: assumed, for the machine's drift between two processes. model has no
# clock: it is shown and never counts as evidence.
SIGNAL_ERROR: Mapping[str, float] = {"hlo": 1.27, "compiler": 1.16, "measured": 1.05}
