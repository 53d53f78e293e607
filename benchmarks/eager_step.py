"""Training steps of three candidates on the CPU beside eager PyTorch. Run by hand, nothing beside.

    uv run --group reference python benchmarks/eager_step.py

ViT-B/16 and ResNet-50 on 8 images of 224x224, a Llama of 134M parameters on 8 sequences of 128
tokens; in float32, AdamW, one process. The reference is Hugging Face's module of the same
architecture (tests/test_reference.py holds their outputs equal), as it comes: forward, loss,
backward, update. Steps take turns, so that what else the machine does meets both; the ratio is the
median over the turns, with its lowest and highest. Ours has its layers as a loop and written out:
XLA:CPU runs a loop's body otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

from jaxbench.compiler import apply_environment

apply_environment()

import jax  # noqa: E402  (reads the environment when it is imported)
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jaxbench.candidate import Candidate, Workload  # noqa: E402
from jaxbench.compiler import make_mesh  # noqa: E402
from jaxbench.layout import parse_layout, resolve_layout  # noqa: E402
from jaxbench.models import language, resnet, vit  # noqa: E402
from jaxbench.models.blocks.stack import Layers  # noqa: E402
from jaxbench.program import build_program  # noqa: E402
from jaxbench.target import parse_target  # noqa: E402

BATCH, TOKENS, TURNS = 8, 128, 5
SMALL_LLAMA = {
    "num_layers": 12,
    "embed_dim": 768,
    "mlp_dim": 2048,
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "remat": "none",
}


def our_step(module: ModuleType, name: str, **fields: Any) -> Callable[[], None]:
    """Returns a function that takes one compiled step of the candidate, in float32."""
    given = next(candidate for candidate in module.CANDIDATES if candidate.name == name)
    candidate = dataclasses.replace(
        given, config=dataclasses.replace(given.config, **fields), workload=_small(given)
    )
    target = parse_target("cpu")
    layout = resolve_layout(parse_layout("data"), target.num_devices)
    with mock.patch.object(module, "DTYPE", jnp.float32):
        program = build_program(candidate, layout, make_mesh(target, layout), "cpu")
    executable = program.lowered.compile()
    state, batch = jax.jit(program.init)(jax.random.key(0))

    def step() -> None:
        nonlocal state
        state, loss = executable(state, batch)
        jax.block_until_ready((state, loss))

    return step


def _small(given: Candidate) -> Workload:
    inputs = [
        (name, dataclasses.replace(value, shape=(TOKENS + 1,)) if name == "tokens" else value)
        for name, value in given.workload.inputs
    ]
    return dataclasses.replace(given.workload, global_batch=BATCH, inputs=tuple(inputs))


def their_step(network: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Returns a function that takes one eager step of a PyTorch network."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        network(**batch).loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Times one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    images = {
        "pixel_values": torch.randn(BATCH, 3, 224, 224),
        "labels": torch.randint(1000, (BATCH,)),
    }
    tokens = torch.randint(32000, (BATCH, TOKENS))
    llama = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
    )
    cases: dict[str, tuple[Callable[[Layers], Any], Callable[[], Any]]] = {
        "ViT-B/16": (
            lambda layers: our_step(vit, "vit-paper-b16", layers=layers),
            lambda: their_step(
                transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)),
                images,
            ),
        ),
        "ResNet-50": (
            lambda layers: our_step(resnet, "resnet-paper-50", layers=layers),
            lambda: their_step(
                transformers.ResNetForImageClassification(
                    transformers.ResNetConfig(num_labels=1000)
                ),
                images,
            ),
        ),
        "Llama 134M": (
            lambda layers: our_step(
                language, "language-paper-llama2_7b", layers=layers, **SMALL_LLAMA
            ),
            lambda: their_step(
                transformers.LlamaForCausalLM(llama), {"input_ids": tokens, "labels": tokens}
            ),
        ),
    }
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    forms: tuple[Layers, ...] = ("unroll", "scan")
    for name, layers in itertools.product(sys.argv[1:] or cases, forms):
        ours, theirs = cases[name][0](layers), cases[name][1]()
        for step in (ours, theirs):
            step()
        turns = [(seconds(ours), seconds(theirs)) for _ in range(TURNS)]
        ratios = sorted(ours / theirs for ours, theirs in turns)
        our_s, their_s = (statistics.median(column) for column in zip(*turns, strict=True))
        print(
            f"{name}, {layers}: ours {our_s:.2f} s, theirs {their_s:.2f} s, ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
