"""decoder-decoder-a30fa128, found by `jaxbench search`.

Against decoder-paper-head64: num_layers 16 -> 9; embed_dim 2048 -> 2560; mlp_dim 8192 -> 11264; num_heads 32 -> 8; num_kv_heads 8 -> 4; head_dim 64 -> 256; remat full -> none.

    jaxbench run decoder-decoder-a30fa128.py
    jaxbench compare decoder-paper-head64 decoder-decoder-a30fa128 --from decoder-decoder-a30fa128.py
"""

import dataclasses

from jaxbench.discovery import load_candidate

BASE = load_candidate('jaxbench.models.decoder', 'decoder-paper-head64')

CANDIDATES = (
    dataclasses.replace(
        BASE,
        name='decoder-decoder-a30fa128',
        config=dataclasses.replace(
            BASE.config,
            num_layers=9,
            embed_dim=2560,
            mlp_dim=11264,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            vocab_size=128256,
            rope_theta=500000.0,
            layers="scan",
            remat="none",
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
        replaces='num_layers 16 -> 9; embed_dim 2048 -> 2560; mlp_dim 8192 -> 11264; num_heads 32 -> 8; num_kv_heads 8 -> 4; head_dim 64 -> 256; remat full -> none',
        validity='T1',
    ),
)
