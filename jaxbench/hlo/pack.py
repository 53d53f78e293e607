"""Optimised HLO as a small file: what our schema reads, nothing else, compressed."""

from __future__ import annotations

import json
import lzma
from typing import Any

from jaxbench.hlo.schema import decode


def pack_module(hlo: bytes) -> bytes:
    """Returns a serialized module without what is never read, LZMA-compressed.

    Source files, stack frames and the machine code of Pallas kernels go; `read_module` of the
    unpacked bytes gives what it gave before.
    """
    module = decode("Module", hlo)
    for computation in module.computations:
        for instruction in computation.instructions:
            instruction.backend_config = _without_code(instruction.backend_config)
    module.DiscardUnknownFields()
    return lzma.compress(module.SerializeToString(), preset=6)


def unpack_module(packed: bytes) -> bytes:
    """Returns the serialized module that `pack_module` packed.

    Raises:
      lzma.LZMAError: if the bytes are damaged.
    """
    return lzma.decompress(packed)


def _without_code(backend_config: bytes) -> bytes:
    if b'"custom_call_config"' not in backend_config:
        return backend_config
    config: dict[str, Any] = json.loads(backend_config)
    config["custom_call_config"].pop("body", None)
    return json.dumps(config).encode()
