"""Every op of the dialect keeps its contract: schema, fake, composition, and its own samples."""

import pytest
import torch

from viditq_fx.ops import all_ops
from viditq_fx.ops.fp8 import E4M3

CPU = torch.device("cpu")
CASES = [(op, sample) for op in all_ops() for sample in op.samples(CPU)]


@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op.name}-{s.label}" for op, s in CASES])
def test_opcheck(op, sample):
    # No autograd tests: the dialect is for inference and defines no derivative.
    checks = ("test_schema", "test_faketensor")
    if any(isinstance(arg, torch.Tensor) and arg.dtype == E4M3 for arg in sample.args):
        # torch's schema check compares arguments before and after by arithmetic, which e4m3 has none of.
        checks = ("test_faketensor",)
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in sample.args]
        result = op.overload(*sample.args)
        for old, new in zip(before, sample.args, strict=True):
            assert not isinstance(old, torch.Tensor) or torch.equal(old.float(), new.float()), (
                "an argument was written"
            )
            assert new is not result
    results = torch.library.opcheck(op.overload, sample.args, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op.name}-{s.label}" for op, s in CASES])
def test_aot_dispatch(op, sample):
    torch.library.opcheck(op.overload, sample.args, test_utils=("test_aot_dispatch_dynamic",))
