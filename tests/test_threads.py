"""Two threads make the first call of one model at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import viditq_fx as vq
from tests.small_models import relative_error
from viditq_fx.ops import blocked, packed_weights
from viditq_fx.ops.onednn import ZERO_POINTS, matmul_u8s8, onednn_is_exact
from viditq_fx.ops.packed_weights import packed_weight
from viditq_fx.scheme import WeightForm

INT8 = WeightForm()
BITS = 8 if onednn_is_exact(8) else 7
ERROR = 0.02


def together(call):
    """The results of two threads that start `call` at once."""
    barrier = threading.Barrier(2)

    def go():
        barrier.wait()
        with torch.no_grad():
            return call()

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(go), pool.submit(go)]]


def test_one_blocks_while_the_other_is_about_to(monkeypatch):
    """The second thread looks at the plain memory first and packs it when the first has freed it."""
    delays, read = iter((0.05, 0.3)), blocked.plain_weight

    def slowly(w_NK):
        plain = read(w_NK)
        time.sleep(next(delays, 0))
        return plain

    monkeypatch.setattr(blocked, "plain_weight", slowly)
    weight, x = torch.randn(256, 256), torch.randint(1, 2 ** (BITS - 1), (80, 256), dtype=torch.uint8)
    q, _ = packed_weight(weight, INT8, "weight")
    want = (x.double() - ZERO_POINTS[BITS]) @ q.double().t()
    for got in together(lambda: matmul_u8s8(x, q, ZERO_POINTS[BITS])):
        assert torch.equal(got.double(), want)


def test_packing_one_weight_twice_gives_one_pair(monkeypatch):
    pack = packed_weights._quantized

    def slowly(*args):
        time.sleep(0.05)
        return pack(*args)

    monkeypatch.setattr(packed_weights, "_quantized", slowly)
    weight = torch.randn(64, 64)
    first, second = together(lambda: packed_weight(weight, INT8, "weight"))
    assert first[0] is second[0]


def test_eager_beside_the_call_that_frees_the_plain_memory():
    model, x = nn.Sequential(nn.Linear(512, 512)).requires_grad_(False), torch.randn(20, 512)
    vq.quantize_(model, (x,))
    want, call = model(x), torch.compile(model, backend="viditq")
    call(x)
    for _ in range(40):
        model.cpu()  # gives the plain memory back
        turns = iter((model, call))
        assert all(relative_error(y, want) < 1e-3 for y in together(lambda turns=turns: next(turns)(x)))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["keep", "release"])
def test_first_compiled_call(weights):
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = nn.Linear(512, 512).requires_grad_(False), torch.randn(40, 512)
        want, call = model(x), torch.compile(model, backend="viditq", options={"weights": weights})
        assert all(relative_error(y, want) < ERROR for y in together(lambda call=call, x=x: call(x)))
