"""Pack and unpack are inverse, and oneDNN's blocked copies give the integers back bit for bit."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.ops.blocked import blocked_weight, is_freed, own, plain_weight, resident_bytes, restore
from viditq_fx.ops.onednn import LAYOUT, onednn_is_exact
from viditq_fx.ops.pack import pack_int8, unpack_int8

needs_onednn = pytest.mark.skipif(not onednn_is_exact(7), reason="no int8 oneDNN in this build")


def weight(rows, depth, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, depth), generator=gen, dtype=torch.int8)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 8, 16, 32, 64]))
def test_round_trip(rows, depth, multiple):
    w = weight(rows, depth)
    packed = pack_int8(w, multiple)
    assert packed.shape[1] % multiple == 0
    assert packed.is_contiguous()
    assert not packed[:, depth:].any()
    assert torch.equal(unpack_int8(packed, depth), w)


def test_bad_arguments():
    with pytest.raises(ValueError, match="int8"):
        pack_int8(torch.ones(2, 3), 16)
    with pytest.raises(ValueError, match="at least 1"):
        pack_int8(weight(2, 3), 0)
    with pytest.raises(ValueError, match="does not fit"):
        unpack_int8(weight(2, 3), 4)


@needs_onednn
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70))
def test_blocked_copy_gives_the_integers_back(rows, depth):
    w = own(weight(rows, depth))
    blocked_weight(w, LAYOUT)
    assert is_freed(w)
    assert torch.equal(plain_weight(w), weight(rows, depth))
    assert torch.equal(restore(w), weight(rows, depth))
    assert not is_freed(w)


@needs_onednn
def test_memory_is_not_taken_twice():
    w = own(weight(256, 512))
    blocked_weight(w, LAYOUT)
    assert resident_bytes(w) <= 1.05 * 256 * 512


@needs_onednn
def test_a_weight_that_is_not_ours_keeps_its_memory():
    w = weight(8, 8)
    blocked_weight(w, LAYOUT)
    assert torch.equal(w, weight(8, 8))


@needs_onednn
def test_a_write_is_noticed_and_copies_go_with_their_weight():
    w = weight(8, 32)
    first = blocked_weight(w, LAYOUT)
    assert blocked_weight(w, LAYOUT) is first
    w.neg_()
    second = blocked_weight(w, LAYOUT)
    assert second is not first
    assert torch.equal(second.to_dense().t().contiguous(), -weight(8, 32))
    alive = copy.copy(w)
    del w
    gc.collect()
    assert resident_bytes(alive) == 8 * 32 + 0  # a new tensor object has no blocked copy
