"""Networks of the `bev` space with fewer blocks and the base's widths.

    jaxbench run flatter.py --targets gpu-h100,gpu-b200,cpu
"""

import dataclasses

from jaxbench.discovery import load_candidate

BASE = load_candidate("jaxbench.models.bev", "bev-drive-gather")


def network(change: str, replaces: str, **fields: object):
    """The base with other config fields."""
    return dataclasses.replace(
        BASE,
        name=f"bev-drive-{change}",
        config=dataclasses.replace(BASE.config, **fields),
        replaces=replaces,
        validity="T1",
    )


CANDIDATES = (
    network(
        "flatsum",
        "two blocks a map stage by one; gather by a segment sum",
        lift="segment_sum",
        bev_depths=(1, 1),
    ),
    network(
        "flatsum_early",
        "two blocks a map stage and in the first camera stage by one; gather by a segment sum",
        lift="segment_sum",
        bev_depths=(1, 1),
        camera_depths=(1, 2),
    ),
    network(
        "flatsum_wide",
        "as flatsum_early, with 6 channels of a lifted point and 12 of the second camera stage",
        lift="segment_sum",
        bev_depths=(1, 1),
        camera_depths=(1, 2),
        camera_channels=(4, 12),
        context=6,
    ),
)
