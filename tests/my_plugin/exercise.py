"""Run where my_plugin is installed: its pass and its kernel template are found, used and reported."""

import json
from importlib.metadata import entry_points

import torch
from nogpu.fake_cuda import cuda_code, missing
from torch import nn

from viditq_fx.backend import viditq_backend
from viditq_fx.options import CompileOptions
from viditq_fx.passes.pipeline import build_pipeline
from viditq_fx.runtime import executions
from viditq_fx.testing import check_rewrite


class FeedForward(nn.Module):
    """down(relu(up(x)) squared)"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h * h)


def on_cpu():
    """(error, report) of the compiled model; nothing names the plugin."""
    torch.manual_seed(0)
    model, x = FeedForward().requires_grad_(False), torch.randn(2, 40, 64)
    with executions() as ran:
        got = torch.compile(model, backend="viditq")(x)
    report = ran[0].report
    return float((got - model(x)).norm() / model(x).norm()), report


def on_fake_gpu(tokens):
    """(generated code, kernels, rejects) for a GPU that is not there."""
    reports = []

    def make():
        with torch.device("cuda"):
            return FeedForward(256).requires_grad_(False), torch.empty(tokens, 256)

    def compiler(gm, inputs):
        # A model as small as this would stay in full precision.
        reports.append(viditq_backend(gm, inputs, options={"selection": "always"}).report)

    code = cuda_code(make, compiler=compiler)
    (report,) = reports
    return code.text, [(site.kernel, site.reason) for site in report.sites], report.rejects


def main():
    (rewrite,) = (p.load() for p in entry_points(group="viditq_fx.passes") if p.name == "name_squared_relu")
    check_rewrite(rewrite)
    found = {}
    error, report = on_cpu()
    found["cpu"] = {
        "error": error,
        "passes": [trace.name for trace in report.passes if trace.matches],
        "prologues": [site.prologue for site in report.sites],
        "rejects": report.rejects,
    }
    found["without"] = [step.name for step in build_pipeline(CompileOptions(plugins=False), report).passes]
    if missing() is None:
        code, few, rejects = on_fake_gpu(32)
        found["gpu"] = {
            "few": few,
            "many": on_fake_gpu(512)[1],
            "rejects": rejects,
            "in_code": "tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)" in code,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
