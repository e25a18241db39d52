"""Every op of the dialect keeps its contract: schema, fake, composition, and its own samples."""

import pytest
import torch

from viditq_fx.ops import all_ops

CPU = torch.device("cpu")
CASES = [(op, sample) for op in all_ops() for sample in op.samples(CPU)]


@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op.name}-{s.label}" for op, s in CASES])
def test_opcheck(op, sample):
    # No autograd tests: the dialect is for inference and defines no derivative.
    results = torch.library.opcheck(op.overload, sample.args, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op.name}-{s.label}" for op, s in CASES])
def test_aot_dispatch(op, sample):
    torch.library.opcheck(op.overload, sample.args, test_utils=("test_aot_dispatch_dynamic",))
