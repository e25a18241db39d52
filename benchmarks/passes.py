"""Time the FX passes alone on Flux graphs of growing depth (narrow weights: passes look at nodes, not values).

    python benchmarks/passes.py

Prints seconds of the whole pipeline (verification included), nodes, and seconds a node: flat means linear.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import diffusers
import torch
from torch import fx

from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.scheme import QuantScheme

DEPTHS = ((2, 4), (5, 10), (10, 20), (19, 38))
"""Double and single blocks; the last is FLUX.1."""
ROUNDS = 3


def flux(double: int, single: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A narrow FluxTransformer2DModel of this depth, and inputs."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    inputs = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(32, 3),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


def measure(double: int, single: int) -> tuple[int, float]:
    """(nodes of Dynamo's graph, best seconds of the pipeline)."""
    torch._dynamo.reset()
    model, inputs = flux(double, single)
    seconds, sizes = [], []

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        for _ in range(ROUNDS):
            graph = copy_graph_module(gm)
            started = time.perf_counter()
            PassPipeline(passes=default_passes()).run(graph, PassContext(scheme=QuantScheme.parse("w8a8")))
            seconds.append(time.perf_counter() - started)
        sizes.append(len(gm.graph.nodes))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(**inputs)
    return sizes[0], min(seconds)


def main() -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    for double, single in DEPTHS:
        nodes, seconds = measure(double, single)
        print(
            f"{double:2}+{single:<2} blocks  {nodes:5} nodes  {seconds:6.2f} s  {1e6 * seconds / nodes:5.0f} us a node"
        )


if __name__ == "__main__":
    main()
