"""decoder-decoder-b5534964, found by `jaxbench search`.

Against decoder-paper-head64: num_heads 32 -> 16; head_dim 64 -> 128.

    jaxbench run decoder-decoder-b5534964.py
    jaxbench compare decoder-paper-head64 decoder-decoder-b5534964 --from decoder-decoder-b5534964.py
"""

import dataclasses

from jaxbench.discovery import load_candidate

BASE = load_candidate('jaxbench.models.decoder', 'decoder-paper-head64')

CANDIDATES = (
    dataclasses.replace(
        BASE,
        name='decoder-decoder-b5534964',
        config=dataclasses.replace(
            BASE.config,
            num_layers=16,
            embed_dim=2048,
            mlp_dim=8192,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            rope_theta=500000.0,
            layers="scan",
            remat="full",
        ),
        workload=dataclasses.replace(
            BASE.workload,
            global_batch=32,
            inputs=tuple(
                (name, dataclasses.replace(given, shape={'tokens': (2049,)}[name]))
                for name, given in BASE.workload.inputs
            ),
        ),
        base='decoder-paper-head64',
        replaces='num_heads 32 -> 16; head_dim 64 -> 128',
        validity='T1',
    ),
)
