"""With scales from calibration the hidden activation of an FFN is stored as integers: it never exists in bf16."""

import re

import pytest
import torch
from nogpu.fake_cuda import missing
from torch.nn import functional as F

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.assemble import assemble_generated, kernel_sources
from nogpu.fake_cuda import cuda_code

from viditq_fx import ops
from viditq_fx.lowering.install import install

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16


class FeedForward(torch.nn.Module):
    """LayerNorm, up, GELU, down in w8a8-timestep, each scale one entry of a table; or in w8a8-position, all of it."""

    def __init__(self, kind, dim=1152, hidden=4608):
        super().__init__()
        self.kind = kind
        for name, (width, depth) in {"up": (hidden, dim), "down": (dim, hidden)}.items():
            self.register_buffer(f"{name}_q", torch.empty(width, depth, dtype=torch.int8, device="cuda"))
            self.register_buffer(f"{name}_scale", torch.empty(width, device="cuda"))
            self.register_buffer(f"{name}_bias", torch.empty(width, dtype=BF16, device="cuda"))
            self.register_buffer(f"{name}_table", torch.empty(1024, device="cuda"))

    def linear(self, x, name, bucket):
        scale = getattr(self, f"{name}_table")
        if self.kind == "timestep":
            scale = torch.index_select(scale, 0, bucket)
        pair = ops.QUANTIZE_STATIC.overload(x, scale, 8)
        weights = (getattr(self, f"{name}_{part}") for part in ("q", "scale", "bias"))
        return ops.LINEAR_W8A8.overload(*pair, *weights, BF16)

    def forward(self, x, bucket):
        hidden = self.linear(F.layer_norm(x, x.shape[-1:]), "up", bucket)
        return self.linear(F.gelu(hidden, approximate="tanh"), "down", bucket)


@pytest.mark.parametrize(("cc", "kind"), [(80, "position"), (90, "timestep")])
def test_the_up_projection_stores_integers(cc, kind):
    def make():
        bucket = torch.zeros(1, dtype=torch.int64, device="cuda")
        return FeedForward(kind), torch.randn(2, 1024, 1152, device="cuda").to(BF16), bucket

    install()
    code, _ = cuda_code(make, cc, None)
    kernels = kernel_sources(code)
    up, down = (source for name, source in kernels.items() if "_tem_" in name)
    signature = re.search(r"signature': \{(.*?)\}", up)[1]
    assert re.search(r"out_ptr\d+': '\*i8'", signature), signature
    assert len(re.findall(r"tl\.store\(", up)) == 1
    assert "tanh" in up
    allocated = re.findall(r"empty_strided_cuda\(\((?:2048|2, 1024), 4608\), .*?(torch\.\w+)\)", code)
    assert allocated == ["torch.int8"]
    for name, source in kernels.items():
        if "_tem_" in name:
            assert assemble_generated(name, source, cc).spills == 0, name
    assert "'*i8'" in down
