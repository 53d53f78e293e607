"""Do networks drive equally well? Frozen data, paired training runs, and a statistical verdict.

shards.py    frozen, hashed key frames
scenes.py    the simulator's side; runs in an environment of its own
readers.py   data of one's own: ScenarioNet scenes, camera rigs
tasks.py     which arrays a network is given, and what it is judged by
training.py  one run, resumable
static.py    exact rewrites, by values and gradients
verdict.py   the statistics
protocol.py  screen, confirm, controls
"""
