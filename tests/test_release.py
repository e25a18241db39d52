"""weights="release": the memory is gone, the compiled model runs on, and nothing else crashes or lies."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from tests.small_models import relative_error, tiny_dit, tiny_inputs
from viditq_fx.errors import ReleasedWeightError, WeightError
from viditq_fx.ops.packed_weights import full_bytes, is_released, packed_bytes
from viditq_fx.ops.release import why_not_release
from viditq_fx.runtime import executions

ERROR = 0.02
RELEASE = {"weights": "release"}


def released_linear(width=64, seed=0):
    torch.manual_seed(seed)
    layer, x = nn.Linear(width, width).requires_grad_(False), torch.randn(40, width)
    want = layer(x)
    call = torch.compile(layer, backend="viditq", options=RELEASE)
    call(x)
    return layer, call, x, want


def resident(tensor):
    """Bytes of physical memory behind a tensor's pages, from the kernel."""
    address, pages, seen = tensor.data_ptr(), 0, 0
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
                low, high = (int(part, 16) for part in line.split(" ")[0].split("-"))
                seen = low <= address < high
            elif seen and line.startswith("Private_Dirty:"):
                pages += int(line.split()[1]) * 1024
                break
    return pages


@pytest.mark.slow
def test_memory_is_really_gone():
    layer, call, x, want = released_linear(1024)
    assert is_released(layer.weight)
    assert full_bytes(layer.weight) == 0
    assert resident(layer.weight) == 0, "no page of its own"
    assert packed_bytes(layer.weight) <= 0.51 * 2 * layer.weight.numel(), "against bf16"
    assert relative_error(call(x), want) < ERROR
    assert relative_error(call(x[:33]), want[:33]) < ERROR, "another shape compiles without the full weight"


def test_eager_use_is_a_clear_error():
    layer, _, x, _ = released_linear()
    for use in (lambda: layer(x), layer.state_dict):
        with pytest.raises(ReleasedWeightError, match=r"weight: its full-precision memory was released"):
            use()


@pytest.mark.parametrize(
    "read",
    [torch.clone, torch.sum, lambda w: w.double(), lambda w: w + 1, lambda w: w.t().contiguous(), repr],
)
def test_reading_the_parameter_gives_nan_and_never_crashes(read):
    layer, *_ = released_linear()
    value = read(layer.weight)
    assert "nan" in value if isinstance(value, str) else torch.isnan(value).all()


def test_a_copy_of_a_released_weight_is_refused():
    layer, _, x, _ = released_linear()
    moved = nn.Linear(64, 64).requires_grad_(False)
    moved.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        torch.compile(moved, backend="viditq")(x)


def test_loading_a_checkpoint_gives_it_memory_again():
    layer, call, x, _ = released_linear()
    fresh = nn.Linear(64, 64).requires_grad_(False)
    layer.load_state_dict(fresh.state_dict())
    assert not is_released(layer.weight)
    torch.testing.assert_close(layer(x), fresh(x))
    assert relative_error(call(x), fresh(x)) < ERROR


def test_tied_to_an_embedding_is_kept_with_a_reason():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lin = nn.Embedding(64, 64), nn.Linear(64, 64)
            self.lin.weight = self.embed.weight

        def forward(self, x):
            return self.lin(x)

    model, x = Tied().requires_grad_(False), torch.randn(40, 64)
    with executions() as ran:
        torch.compile(model, backend="viditq", options=RELEASE)(x)
    assert not is_released(model.lin.weight)
    assert "tied: also read by Embedding" in (ran[0].report.sites[0].reason or "")


def test_a_view_of_a_larger_storage_is_kept():
    base = torch.randn(128, 64)
    assert "shared with other tensors" in (why_not_release(nn.Parameter(base[:64]), ()) or "")


def test_a_graph_that_needs_the_full_weight_says_so():
    _layer, call, x, _ = released_linear()
    with pytest.raises(ReleasedWeightError, match="use weights='keep'"):
        call(x[:3])  # three rows: the policy keeps full precision, which is gone


def test_blocks_release_one_by_one():
    model, inputs = tiny_dit(3), tiny_inputs()
    with torch.no_grad():
        want = model(*inputs)
        for block in model.blocks:
            block.compile(backend="viditq", options=RELEASE)
        for _ in range(2):
            with executions() as ran:
                assert relative_error(model(*inputs), want) < ERROR
    assert len({id(run.report) for run in ran}) == 1, "hooks of released blocks cause no recompile"
    assert all(is_released(block.q.weight) for block in model.blocks)
    assert not is_released(model.stem.weight)


def test_packed_weights_go_with_their_model():
    from viditq_fx.ops import packed_weights

    gc.collect()
    before = len(packed_weights._ENTRIES)
    layer, call, _x, _want = released_linear(seed=5)
    assert len(packed_weights._ENTRIES) == before + 1
    del layer, call
    torch._dynamo.reset()
    gc.collect()
    assert len(packed_weights._ENTRIES) == before


def test_a_copy_is_refused_until_a_checkpoint_is_loaded_into_it():
    layer, _, x, want = released_linear()
    torch.manual_seed(0)
    state = nn.Linear(64, 64).state_dict()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for use in (lambda other=other: other(x), other.state_dict):
            with pytest.raises(ReleasedWeightError, match="was released"):
                use()
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), want)
    with pytest.raises(ReleasedWeightError):
        layer(x)


def test_hooks_do_not_pile_up():
    layer, call, x, _ = released_linear()
    state = nn.Linear(64, 64).state_dict()
    for _ in range(3):
        layer.load_state_dict(state)
        call(x)
    assert is_released(layer.weight)
    assert len(layer._forward_pre_hooks) == len(layer._state_dict_pre_hooks) == 1


def test_inference_weights_are_kept_with_a_reason():
    """They have no version counter: a checkpoint that is loaded into them would not be noticed."""
    with torch.inference_mode(), executions() as ran:
        layer, call, x, want = released_linear()
        assert not is_released(layer.weight)
        assert "made under torch.inference_mode()" in (ran[0].report.sites[0].reason or "")
        assert relative_error(call(x), want) < ERROR


def test_release_under_inference_mode_of_a_normal_weight():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(40, 64)
    want, call = layer(x), torch.compile(layer, backend="viditq", options=RELEASE)
    with torch.inference_mode():
        call(x)
        assert relative_error(call(x), want) < ERROR
    assert is_released(layer.weight)
    assert not layer.weight.is_inference()
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    assert not is_released(layer.weight)
