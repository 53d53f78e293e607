"""Outputs against Hugging Face's transformers, whose random weights are carried over, in float32.

Needs the dependency group `reference` and runs with `-m reference`. Batch norm takes the statistics
of the batch on both sides, as in training. Networks whose published size is light have it, on
smaller images; the others keep their parts and lose width and layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import QUICK, Values, count_parameters, fill

from jaxbench.candidate import Candidate
from jaxbench.models import convnet, convnext, language, moe, regnet, resnet, t5, vit

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("default")]

# Sums of float32 in another order, through up to 60 layers.
TOLERANCE = 1e-4
Tree = dict[Any, Any]


@pytest.fixture(scope="module")
def hf() -> Any:
    """The library, with PyTorch made repeatable."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    return transformers


def draw(module: Any) -> Any:
    """Gives every parameter a value that matters: none starts at zero, scales differ from one."""
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim > 1:
                fan_in = value[0].numel() if value.ndim in (2, 4) else value.shape[-1]
                value.normal_(0, fan_in**-0.5)
            else:
                value.normal_(0 if name.endswith("bias") else 1, 0.2)
    return module


def agree(
    module: ModuleType,
    candidate: Candidate,
    tree: Tree,
    reference: Callable[[], Any],
    call: Callable[[Any], Any],
) -> None:
    """Asserts that the network with the values of `tree` gives what `reference` gives."""
    import torch

    values = dict(flatten(tree))
    assert count_parameters(candidate) == sum(value.size for value in values.values())
    with mock.patch.object(module, "DTYPE", jnp.float32):
        graph, state = nnx.split(fill(candidate, values))
        forward = jax.jit(lambda state: call(nnx.merge(graph, state)), compiler_options=QUICK)
        found = np.asarray(forward(state))
    with torch.no_grad():
        wanted = reference().numpy()
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


def flatten(tree: Any, path: tuple[Any, ...] = ()) -> Values:
    """Lists the arrays of nested mappings and sequences by path."""
    if isinstance(tree, Mapping):
        branches = tree.items()
    elif isinstance(tree, Sequence):
        branches = enumerate(tree)
    else:
        return {path: tree}
    return {k: v for key, branch in branches for k, v in flatten(branch, (*path, key)).items()}


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float32)


def stacked(layers: Sequence[Tree]) -> Tree:
    """Layers of equal parts as one, stacked for a loop."""
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def conv(layer: Any) -> Tree:
    tree = {"kernel": array(layer.weight).transpose(2, 3, 1, 0)}
    return tree if layer.bias is None else tree | {"bias": array(layer.bias)}


def linear(layer: Any) -> Tree:
    """A linear layer, or a 1x1 convolution that is one."""
    weight = array(layer.weight)
    tree = {"kernel": weight.reshape(weight.shape[:2]).T}
    return tree if layer.bias is None else tree | {"bias": array(layer.bias)}


def norm(layer: Any) -> Tree:
    tree = {"scale": array(layer.weight)}
    bias = getattr(layer, "bias", None)
    return tree if bias is None else tree | {"bias": array(bias)}


def heads(layer: Any, num_heads: int) -> np.ndarray:
    """[D, N, H] of a projection to heads."""
    kernel = array(layer.weight).T
    return kernel.reshape(kernel.shape[0], num_heads, -1)


def joined(layer: Any, num_heads: int) -> np.ndarray:
    """[N, H, D] of the projection from heads."""
    kernel = array(layer.weight).T
    return kernel.reshape(num_heads, -1, kernel.shape[1])


def images(edge: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, edge, edge, 3), np.float32)


def tokens(vocab_size: int, length: int = 24) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (2, length))


def find(candidates: Sequence[Candidate], name: str, **fields: Any) -> Candidate:
    """The candidate of that name, with other fields of its configuration."""
    candidate = next(candidate for candidate in candidates if candidate.name == name)
    return dataclasses.replace(candidate, config=dataclasses.replace(candidate.config, **fields))


def classify(network: Any, pixels: np.ndarray) -> Callable[[], Any]:
    import torch

    given = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return lambda: network.train()(pixel_values=given).logits


# --- Convolutional networks ---


def test_resnet_50_agrees(hf: Any) -> None:
    network = draw(hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)))

    def unit(layer: Any) -> Tree:
        return conv(layer.convolution) | {"norm": norm(layer.normalization)}

    def block(layer: Any) -> Tree:
        names = ("reduce", "filter", "expand")
        tree = {name: unit(part) for name, part in zip(names, layer.layer, strict=True)}
        has_shortcut = hasattr(layer.shortcut, "convolution")
        return tree | ({"shortcut": unit(layer.shortcut)} if has_shortcut else {})

    def stage(layers: Any) -> Tree:
        first, *rest = (block(layer) for layer in layers.layers)
        return {"first": {"layers": [first]}, "rest": {"layers": stacked(rest)}}

    tree = {
        "stem": {"unit": unit(network.resnet.embedder.embedder)},
        "stages": [stage(layers) for layers in network.resnet.encoder.stages],
        "classify": linear(network.classifier[1]),
    }
    candidate, pixels = find(resnet.CANDIDATES, "resnet-paper-50"), images(96)
    agree(resnet, candidate, tree, classify(network, pixels), lambda net: net(jnp.asarray(pixels)))


def test_regnety_1600mf_agrees(hf: Any) -> None:
    config = hf.RegNetConfig(
        hidden_sizes=[48, 120, 336, 888],
        depths=[2, 6, 17, 2],
        groups_width=24,
        layer_type="y",
        num_labels=1000,
    )
    network = draw(hf.RegNetForImageClassification(config))

    def unit(layer: Any) -> Tree:
        return {"conv": conv(layer.convolution), "norm": norm(layer.normalization)}

    def block(layer: Any) -> Tree:
        reduce, filter_, gate, expand = layer.layer
        tree = {"reduce": unit(reduce), "filter": unit(filter_), "expand": unit(expand)}
        tree["gate"] = {"reduce": linear(gate.attention[0]), "expand": linear(gate.attention[2])}
        has_shortcut = hasattr(layer.shortcut, "convolution")
        return tree | ({"shortcut": unit(layer.shortcut)} if has_shortcut else {})

    def stage(layers: Any) -> Tree:
        first, *rest = (block(layer) for layer in layers.layers)
        return {"first": {"layers": [first]}, "rest": {"layers": stacked(rest)}}

    tree = {
        "stem": unit(network.regnet.embedder.embedder),
        "stages": [stage(layers) for layers in network.regnet.encoder.stages],
        "classify": linear(network.classifier[1]),
    }
    candidate, pixels = find(regnet.CANDIDATES, "regnet-paper-1600mf"), images(96)
    agree(regnet, candidate, tree, classify(network, pixels), lambda net: net(jnp.asarray(pixels)))


def test_efficientnet_b0_agrees(hf: Any) -> None:
    config = hf.EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=224,
        hidden_dim=1280,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=1000,
    )
    network = draw(hf.EfficientNetForImageClassification(config))
    body = network.efficientnet

    def unit(convolution: Any, batch_norm: Any) -> Tree:
        return {"conv": conv(convolution), "norm": norm(batch_norm)}

    def block(layer: Any) -> Tree:
        filter_, project, gate = layer.depthwise_conv, layer.projection, layer.squeeze_excite
        tree = {
            "filter": unit(filter_.depthwise_conv, filter_.depthwise_norm),
            "gate": {"reduce": linear(gate.reduce), "expand": linear(gate.expand)},
            "project": unit(project.project_conv, project.project_bn),
        }
        if layer.expand:
            widen = layer.expansion
            tree["widen"] = unit(widen.expand_conv, widen.expand_bn)
        return tree

    candidate, pixels = find(convnet.CANDIDATES, "convnet-paper-mbconv"), images(96)
    blocks = iter(body.encoder.blocks)
    tree = {
        "stem": unit(body.embeddings.convolution, body.embeddings.batchnorm),
        "stages": [
            {"blocks": [block(next(blocks)) for _ in range(depth)]}
            for depth in candidate.config.depths
        ],
        "head": {
            "conv": unit(body.encoder.top_conv, body.encoder.top_bn),
            "classify": linear(network.classifier),
        },
    }
    agree(convnet, candidate, tree, classify(network, pixels), lambda net: net(jnp.asarray(pixels)))


def test_convnext_t_agrees(hf: Any) -> None:
    config = hf.ConvNextConfig(layer_norm_eps=1e-6, num_labels=1000)
    network = draw(hf.ConvNextForImageClassification(config))
    body = network.convnext

    def block(layer: Any) -> Tree:
        return {
            "filter": conv(layer.dwconv),
            "norm": norm(layer.layernorm),
            "mlp": {"up": linear(layer.pwconv1), "down": linear(layer.pwconv2)},
            "scale": array(layer.layer_scale_parameter),
        }

    def stage(index: int, layers: Any) -> Tree:
        shrink = (
            (body.embeddings.layernorm, body.embeddings.patch_embeddings)
            if index == 0
            else layers.downsampling_layer
        )
        return {
            "norm": norm(shrink[0]),
            "shrink": conv(shrink[1]),
            "blocks": {"layers": stacked([block(layer) for layer in layers.layers])},
        }

    tree = {
        "stages": [stage(index, layers) for index, layers in enumerate(body.encoder.stages)],
        "norm": norm(body.layernorm),
        "classify": linear(network.classifier),
    }
    candidate, pixels = find(convnext.CANDIDATES, "convnext-paper-t"), images(96)
    agree(
        convnext, candidate, tree, classify(network, pixels), lambda net: net(jnp.asarray(pixels))
    )


# --- Transformers ---


def test_vit_b16_agrees(hf: Any) -> None:
    network = draw(hf.ViTForImageClassification(hf.ViTConfig(layer_norm_eps=1e-6, num_labels=1000)))
    embed = network.vit.embeddings

    def layer(part: Any) -> Tree:
        attention = part.attention
        rows = (attention.q_proj, attention.k_proj, attention.v_proj)
        return {
            "attention_norm": norm(part.layernorm_before),
            "attention": {
                "project": np.stack([heads(row, 12) for row in rows], axis=1),
                "project_bias": np.stack([array(row.bias).reshape(12, 64) for row in rows]),
                "out": joined(attention.o_proj, 12),
                "out_bias": array(attention.o_proj.bias),
            },
            "mlp_norm": norm(part.layernorm_after),
            "mlp": {"up": linear(part.mlp.fc1), "down": linear(part.mlp.fc2)},
        }

    tree = {
        "embed": {
            "project": conv(embed.patch_embeddings.projection),
            "positions": array(embed.position_embeddings)[0],
            "token": array(embed.cls_token)[0],
        },
        "stack": {"layers": stacked([layer(part) for part in network.vit.layers])},
        "norm": norm(network.vit.layernorm),
        "classify": linear(network.classifier),
    }
    candidate, pixels = find(vit.CANDIDATES, "vit-paper-b16"), images(224)
    agree(vit, candidate, tree, classify(network, pixels), lambda net: net(jnp.asarray(pixels)))


def decoder_tree(network: Any, layer: Callable[[Any], Tree]) -> Tree:
    return {
        "table": array(network.model.embed_tokens.weight),
        "stack": {"layers": stacked([layer(part) for part in network.model.layers])},
        "norm": norm(network.model.norm),
    }


SMALL = {"num_layers": 3, "embed_dim": 64, "vocab_size": 200, "remat": "none"}
SMALL_HF = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 200, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(("name", "num_kv_heads"), [("llama2_7b", 4), ("llama3_8b", 2)])
def test_llama_agrees(hf: Any, name: str, num_kv_heads: int) -> None:
    import torch

    candidate = find(
        language.CANDIDATES,
        f"language-paper-{name}",
        mlp_dim=176,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        **SMALL,
    )
    config = hf.LlamaConfig(
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": candidate.config.theta},
        **SMALL_HF,
    )
    network = draw(hf.LlamaForCausalLM(config)).eval()

    def layer(part: Any) -> Tree:
        attention, mlp = part.self_attn, part.mlp
        return {
            "attention_norm": norm(part.input_layernorm),
            "attention": {
                "inputs": {
                    0: heads(attention.q_proj, 4),
                    1: heads(attention.k_proj, num_kv_heads),
                    2: heads(attention.v_proj, num_kv_heads),
                },
                "out": joined(attention.o_proj, 4),
            },
            "mlp_norm": norm(part.post_attention_layernorm),
            "mlp": {
                "up": linear(mlp.up_proj),
                "gate": linear(mlp.gate_proj),
                "down": linear(mlp.down_proj),
            },
        }

    tree = decoder_tree(network, layer) | {"output": array(network.lm_head.weight).T}
    text = tokens(200)
    agree(
        language,
        candidate,
        tree,
        lambda: network(input_ids=torch.from_numpy(text)).logits,
        lambda net: net.logits(net.read(jnp.asarray(text))),
    )


@pytest.mark.parametrize("dispatch", ["ragged", "dense", "onehot_full"])
def test_mixtral_agrees(hf: Any, dispatch: str) -> None:
    import torch

    candidate = find(
        moe.CANDIDATES,
        "moe-paper-mixtral-8x7b",
        expert_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        dispatch=dispatch,
        **SMALL,
    )
    config = hf.MixtralConfig(
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **SMALL_HF,
    )
    network = draw(hf.MixtralForCausalLM(config)).eval()

    def layer(part: Any) -> Tree:
        attention, mlp = part.self_attn, part.mlp
        gate, up = np.split(array(mlp.experts.gate_up_proj).swapaxes(1, 2), 2, axis=-1)
        return {
            "attention_norm": norm(part.input_layernorm),
            "attention": {
                "query": heads(attention.q_proj, 4),
                "key": heads(attention.k_proj, 2),
                "value": heads(attention.v_proj, 2),
                "out": joined(attention.o_proj, 4),
            },
            "mlp_norm": norm(part.post_attention_layernorm),
            "mlp": {
                "router": {"kernel": array(mlp.gate.weight).T},
                "gate": gate,
                "up": up,
                "down": array(mlp.experts.down_proj).swapaxes(1, 2),
            },
        }

    tree = decoder_tree(network, layer) | {"head": linear(network.lm_head)}
    text = tokens(200)
    agree(
        moe,
        candidate,
        tree,
        lambda: network(input_ids=torch.from_numpy(text)).logits,
        lambda net: net(jnp.asarray(text)),
    )


@pytest.mark.parametrize(("name", "act"), [("base", "relu"), ("v11large", "gated-gelu")])
def test_t5_agrees(hf: Any, name: str, act: str) -> None:
    import torch

    candidate = find(
        t5.CANDIDATES, f"t5-paper-{name}", mlp_dim=96, num_heads=4, head_dim=16, **SMALL
    )
    config = hf.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=3,
        num_heads=4,
        vocab_size=200,
        dropout_rate=0.0,
        feed_forward_proj=act,
        tie_word_embeddings=act == "relu",
    )
    network = draw(hf.T5ForConditionalGeneration(config)).eval()

    def attention(part: Any) -> Tree:
        rows = {"query": part.q, "key": part.k, "value": part.v}
        return {key: heads(row, 4) for key, row in rows.items()} | {"out": joined(part.o, 4)}

    def mlp(part: Any) -> Tree:
        tree = {"down": linear(part.wo)}
        if act == "relu":
            return tree | {"up": linear(part.wi)}
        return tree | {"gate": linear(part.wi_0), "up": linear(part.wi_1)}

    def layer(block: Any) -> Tree:
        first, *cross, last = block.layer
        parts = {"attention": (first, attention(first.SelfAttention))}
        if cross:
            parts["cross"] = (cross[0], attention(cross[0].EncDecAttention))
        parts["mlp"] = (last, mlp(last.DenseReluDense))
        return {
            key: {"norm": norm(branch.layer_norm), "part": part}
            for key, (branch, part) in parts.items()
        }

    def side(stack: Any) -> Tree:
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        return {
            "bias": {"table": array(table.weight)},
            "stack": {"layers": stacked([layer(block) for block in stack.block])},
            "norm": norm(stack.final_layer_norm),
        }

    tree = {
        "table": {"rows": array(network.shared.weight)},
        "encoder": side(network.encoder),
        "decoder": side(network.decoder),
    }
    if act != "relu":
        tree["head"] = linear(network.lm_head)
    source, target = tokens(200, 40), tokens(200, 24)
    agree(
        t5,
        candidate,
        tree,
        lambda: (
            network(
                input_ids=torch.from_numpy(source), decoder_input_ids=torch.from_numpy(target)
            ).logits
        ),
        lambda net: net(jnp.asarray(source), jnp.asarray(target)),
    )
