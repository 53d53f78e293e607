"""A candidate file whose candidates are none."""

CANDIDATES = ("tiny-cpu-wide", "tiny-cpu-deep")
