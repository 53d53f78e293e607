"""bev-bev-b1168bc2, found by `jaxbench search`.

Against bev-drive-gather: camera_channels.1 8 -> 4; camera_depths.0 2 -> 1; bev_depths.0 2 -> 1; bev_depths.1 2 -> 1.

    jaxbench run bev-bev-b1168bc2.py
    jaxbench compare bev-drive-gather bev-bev-b1168bc2 --from bev-bev-b1168bc2.py
"""

import dataclasses

from jaxbench.discovery import load_candidate

BASE = load_candidate('jaxbench.models.bev', 'bev-drive-gather')

CANDIDATES = (
    dataclasses.replace(
        BASE,
        name='bev-bev-b1168bc2',
        config=dataclasses.replace(
            BASE.config,
            lift="gather",
            stem=4,
            camera_channels=(4, 4),
            camera_depths=(1, 2),
            context=4,
            num_bins=16,
            nearest_m=2,
            bin_m=2,
            fov_degrees=70,
            extent_m=32,
            bev_channels=(4, 8),
            bev_depths=(1, 1),
        ),
        workload=dataclasses.replace(
            BASE.workload,
            global_batch=8,
            inputs=tuple(
                (name, dataclasses.replace(given, shape={'images': (6, 48, 128, 3), 'labels': (64, 64)}[name]))
                for name, given in BASE.workload.inputs
            ),
        ),
        base='bev-drive-gather',
        replaces='camera_channels.1 8 -> 4; camera_depths.0 2 -> 1; bev_depths.0 2 -> 1; bev_depths.1 2 -> 1',
        validity='T1',
    ),
)
