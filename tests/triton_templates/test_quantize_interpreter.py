"""The quantize kernels, run by Triton's interpreter, give the references' integers and scales."""

import pytest
import torch

from viditq_fx.ops import ACTIVATION_QUANTIZE, NORM_MODULATE_QUANTIZE, ROTATE_QUANTIZE
from viditq_fx.ops.activation import ACTIVATIONS

pytest.importorskip("triton", reason="the kernels are Triton kernels and Triton is not installed")

from nogpu.interpreter import run_interpreted

pytestmark = pytest.mark.slow  # a subprocess imports torch and Triton anew for each file

REFERENCES = {
    "norm": NORM_MODULATE_QUANTIZE.reference,
    "activation": ACTIVATION_QUANTIZE.reference,
    "rotate": ROTATE_QUANTIZE.reference,
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def draw(*shape, dtype=F32):
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=gen).to(dtype)


def norm(x, kind="layer_norm", *, affine=False, scale=None, offset=1.0, shift=None, bits=8, **more):
    width = x.shape[-1]
    pair = (1 + 0.1 * draw(width), draw(width)) if affine else (None, None)
    return "norm", (x, kind, *pair, 1e-6, scale, offset, shift, bits), more


def activation(x, kind, gate=None, bits=8):
    return "activation", (x, kind, gate, bits), {}


def rotate(x, block, group=0, *, multiplier=False, bits=8):
    width = x.shape[-1]
    factor = draw(width).sign() * (0.5 + draw(width).abs()) if multiplier else None
    return "rotate", (x, factor, block, bits, group), {}


HALVES = draw(3, 5, 144, dtype=BF16).chunk(2, -1)
BROKEN = draw(17, 72)
BROKEN[3, 5], BROKEN[7, 0], BROKEN[9] = float("nan"), float("inf"), 0.0
NORMS = {
    "adaln": norm(draw(2, 9, 1152, dtype=BF16), scale=draw(2, 1, 1152), shift=draw(2, 1, 1152)),
    "one-row": norm(draw(1, 40), scale=draw(40), shift=draw(1, 40)),
    "affine": norm(draw(17, 40, dtype=F16), affine=True),
    "rms-affine": norm(draw(17, 72), "rms_norm", affine=True),
    "by-token": norm(draw(2, 5, 40), "rms_norm", scale=draw(2, 5, 40), shift=draw(5, 40), offset=0.0),
    "by-frame": norm(draw(2, 3, 4, 40), scale=draw(2, 1, 1, 40), shift=draw(1, 3, 1, 40)),
    "by-row": norm(draw(2, 5, 40), scale=draw(2, 5, 1), shift=draw(5, 1)),
    "vector": norm(draw(40), scale=draw(40)),
    "strided": norm(draw(6, 2, 40).transpose(0, 1), scale=draw(2, 1, 40)),
    "wide": norm(draw(2, 3075, dtype=BF16), affine=True, bits=7),
    "multiplier": norm(draw(17, 72), shift=draw(72), multiplier=0.5 + draw(72).abs()),
    "broken": norm(BROKEN),
}
ACTIVATION_CASES = {
    **{kind: activation(3 * draw(17, 72), kind) for kind in ACTIVATIONS},
    "geglu": activation(HALVES[0], "gelu", HALVES[1]),
    "swiglu": activation(*HALVES[:1], "silu", HALVES[1], bits=7),
    "fp16": activation(draw(1, 40, dtype=F16), "gelu_tanh"),
    "wide-activation": activation(draw(2, 3, 3075, dtype=BF16), "gelu_tanh"),
    "gate-of-one-row": activation(draw(5, 40), "silu", draw(1, 40)),
    "broken-activation": activation(BROKEN, "gelu_tanh"),
}
ROTATIONS = {
    "block-4": rotate(draw(17, 40), 4, multiplier=True),
    "block-16": rotate(draw(17, 48, dtype=BF16), 16),
    "block-64": rotate(draw(17, 1152, dtype=BF16), 64, multiplier=True),
    "block-256": rotate(draw(2, 3, 3072, dtype=BF16), 256),
    "block-256-fp32": rotate(draw(3, 768), 256, multiplier=True),
    "block-256-fp16": rotate(draw(1, 256, dtype=F16), 256, bits=7),
    "no-rotation": rotate(draw(17, 33), 1, multiplier=True),
    "groups": rotate(draw(3, 3, 1152, dtype=BF16), 64, 128, multiplier=True),
    "short-last-group": rotate(draw(5, 192), 64, 128, bits=4),
    "one-group": rotate(draw(5, 40), 4, 128),
    "group-wider-than-the-row": rotate(draw(5, 40), 4, 1024),
    "strided-rotation": rotate(draw(4, 512)[:, 256:], 256),
    "vector-rotation": rotate(draw(64), 64),
    "no-rows": rotate(draw(0, 64), 64, 32),
    "broken-rotation": rotate(BROKEN[:, :64], 64, 16),
}
CASES = NORMS | ACTIVATION_CASES | ROTATIONS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpret")
    made = run_interpreted("nogpu.interpret_quantize", list(CASES.values()), folder)
    return dict(zip(CASES, made, strict=True))


def expected(label):
    name, args, more = CASES[label]
    if "multiplier" in more:  # the dialect's op has none: norm and shift, then balance and quantize
        x, _, _, _, eps, _, _, shift, bits = args
        h = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) + shift
        return torch.ops.viditq.quantize_per_token(h * more["multiplier"], bits)
    return REFERENCES[name](*args)


@pytest.mark.parametrize("label", CASES)
def test_equals_the_reference(results, label):
    q, s = results[label]
    want_q, want_s = expected(label)
    assert (q.shape, s.shape, q.dtype, s.dtype) == (want_q.shape, want_s.shape, torch.int8, F32)
    finite = want_s.isfinite()
    assert torch.equal(s.isfinite(), finite)
    # Two bf16 parts keep 17 bits; the interpreter cuts off where devices round, so 15 here, twice for two products.
    torch.testing.assert_close(s[finite], want_s[finite], rtol=6e-5 if label in ROTATIONS else 3e-6, atol=0)
    off = (q.int() - want_q.int()).abs()
    # A value that moves by so little still rounds to the other integer where it is close to a half.
    assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() <= 1e-3)


@pytest.mark.parametrize("label", ["broken", "broken-activation", "broken-rotation"])
def test_what_is_not_finite_stays_in_its_row(results, label):
    q, s = results[label]
    bad = torch.zeros(17, dtype=torch.bool)
    bad[[3, 7]] = True
    assert torch.equal(~s.isfinite().all(-1), bad)
    assert torch.equal(q[9], torch.zeros_like(q[9]))
    assert s[9].isfinite().all()


def test_refusals():
    from viditq_fx.triton_templates.quantize_rows import launch_activation, launch_norm
    from viditq_fx.triton_templates.rotate_quantize import launch

    x = torch.ones(2, 64)
    for says, call in {
        "does not fit": lambda: launch(torch.ones(1, 16640), None, 256, 8, 0),
        "blocks of up to 256": lambda: launch(torch.ones(1, 1024), None, 1024, 8, 0),
        "power of two": lambda: launch(x, None, 4, 8, 48),
        "power of 4": lambda: launch(x, None, 8, 8, 0),
        "2 to 8 bits": lambda: launch(x, None, 4, 9, 0),
        "norm is one of": lambda: launch_norm(x, "batch_norm", None, None, 1e-6, None, 0.0, None, 8),
        "kind is one of": lambda: launch_activation(x, "tanh", None, 8),
        "K=0": lambda: launch_activation(torch.ones(2, 0), "silu", None, 8),
    }.items():
        with pytest.raises(ValueError, match=says):
            call()
