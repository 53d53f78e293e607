"""The identity of an optimised module: what it computes and how, not where it was written."""

from __future__ import annotations

import hashlib

from jaxbench.hlo.schema import decode


def digest_module(hlo: bytes) -> str:
    """Returns a SHA-256 that equal programs share, whatever files, lines and scopes made them.

    Left out are the paths and lines of the sources, scopes, and the module's number, which counts
    what the process had compiled before, and attributes of the module as a whole, where XLA keeps a
    fingerprint of what it was given. Layouts, fusions, order and the compiler's own
    configuration of each op count.

    Raises:
      HloReadError: if the bytes are no HLO module.
    """
    module = decode("Module", hlo)
    for field in ("id", "stack_frames", "frontend_attributes"):
        module.ClearField(field)
    for computation in module.computations:
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
    return hashlib.sha256(module.SerializeToString(deterministic=True)).hexdigest()
