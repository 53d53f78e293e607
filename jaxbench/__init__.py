"""Which of several equally good networks trains faster, on which hardware, and why.

A candidate is one network with one workload, written once in Flax NNX:

    from flax import nnx
    from jaxbench import Candidate, Input, Workload

    CANDIDATES = (
        Candidate(
            name="mynet-small-wide",
            family="mynet",
            size="small",
            config=MyConfig(width=512),
            build=lambda config, rngs: MyNet(config, rngs),
            loss=lambda module, batch: jnp.mean((module(batch["x"]) - batch["y"]) ** 2),
            workload=Workload(
                global_batch=64, inputs=(("x", Input(shape=(32,))), ("y", Input(shape=(8,))))
            ),
            base="mynet-small-wide",
            source="ours",
        ),
    )

`jaxbench run my_net.py --targets tpu-v6e:4x4,gpu-h100:8` compiles its whole training step with the
real compilers, prices the compiled program and predicts the step. `jaxbench measure A B` times
candidates against each other on the attached device.

Candidates with the same `base` are rivals: choices for the same place, held to be equally valid.
Parameters carry logical axes (`nnx.with_partitioning`), activations may (`constrain`); a layout
maps them to the mesh:

    batch -> data, fsdp    embed, conv_out -> fsdp    mlp, heads, kv_heads, vocab -> tensor

Modules carry `@jax.named_scope`, so that the compiled program can be read by module.

The stages, each a file: candidate, layout, target, program, compiler, hlo/, cost, network,
predict/, measure/, record, compare, gate/, report/. `evaluate` strings those up to the prediction
together in a worker, and `run` runs many.

search/ explores a space of networks: a file with a `SPACE` (`help("jaxbench.search.space")`).
quality/ trains networks in pairs on frozen driving data and says whether one is as good as another.
"""

from jaxbench.candidate import Candidate, Input, Workload, constrain

__all__ = ["Candidate", "Input", "Workload", "constrain"]
