"""Delta-guided bit switching: the rule, what a generation is, and one compiled pair that follows it."""

import contextlib
import copy
import dataclasses
import io
import math
import threading

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st

import viditq_fx as vq
from tests.small_models import relative_error, tiny_dit, tiny_inputs
from viditq_fx import switching
from viditq_fx.errors import OptionError, ViditqError
from viditq_fx.switching import HIGH, LOW, BitSwitch, SwitchRule, generation


def drive(switch, steps, outputs, shapes="a"):
    """Bits of each step of one branch with these outputs."""
    bits = []
    for timestep, output in zip(steps, outputs, strict=True):
        chosen, live = switch.begin(torch.tensor([timestep]), shapes)
        switch.end(live, [output])
        bits.append(chosen)
    return bits


def ramp(changes):
    """Outputs whose relative L1 changes are these."""
    value = [torch.ones(4)]
    for change in changes:
        value.append(value[-1] * (1 + change))
    return value


def by_hand(changes, delta, first):
    """Equation 11 for steps whose output moves by `changes` afterwards, written as a loop."""
    bits, total = [], 0.0
    for step in range(len(changes) + 1):
        total += changes[step - 2] if step >= 2 else 0.0
        low = step >= max(first, 2) and total < delta
        bits.append(LOW if low else HIGH)
        total = total if low else 0.0
    return bits


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.floats(0, 0.2).map(lambda v: round(v, 3)), min_size=1, max_size=12),
    delta=st.sampled_from([0.0, 0.0905, 0.1503, 10.0]),
    first=st.integers(0, 4),
)
def test_the_rule_is_equation_11(changes, delta, first):
    switch = BitSwitch(SwitchRule(delta=delta, high_first=first))
    outputs = [value.double() for value in ramp(changes)]
    steps = [1000.0 - 10 * i for i in range(len(outputs))]
    # The first change is known at step 2: F_1 against F_0 is measured when step 1 has run.
    assert drive(switch, steps, outputs) == by_hand(changes, delta, first)


def test_delta_zero_is_high_and_huge_is_low_after_two_steps():
    steps, outputs = [9.0, 8.0, 7.0, 6.0], ramp([0.01] * 3)
    assert drive(BitSwitch(SwitchRule(delta=0)), steps, outputs) == [HIGH] * 4
    assert drive(BitSwitch(SwitchRule(delta=1e30)), steps, outputs) == [HIGH, HIGH, LOW, LOW]
    last = SwitchRule(delta=1e30, high_last=1, steps=4)
    assert drive(BitSwitch(last), steps, outputs) == [HIGH, HIGH, LOW, HIGH]
    told = SwitchRule(schedule=(LOW, HIGH))
    assert drive(BitSwitch(told), steps, outputs) == [LOW, HIGH, HIGH, HIGH]


@pytest.mark.parametrize("output", [torch.full((4,), math.nan), torch.full((4,), math.inf)], ids=str)
def test_an_output_without_a_value_means_high_bits(output):
    switch = BitSwitch(SwitchRule(delta=1e30))
    assert drive(switch, [9.0, 8.0, 7.0], [torch.ones(4), output, torch.ones(4)])[2] == HIGH


def test_zeros_are_no_change_and_growing_from_zero_is_infinite():
    zero = torch.zeros(4)
    assert drive(BitSwitch(SwitchRule()), [3.0, 2.0, 1.0], [zero] * 3) == [HIGH, HIGH, LOW]
    assert drive(BitSwitch(SwitchRule()), [3.0, 2.0, 1.0], [zero, torch.ones(4), zero])[2] == HIGH


@pytest.mark.parametrize("direction", [1, -1])
def test_a_new_generation_is_seen_by_the_timestep_turning(direction):
    switch = BitSwitch(SwitchRule(delta=1e30))
    steps = [0.1 * direction * i for i in range(4)]
    once = drive(switch, steps, ramp([0.01] * 3))
    assert drive(switch, steps[:3], ramp([0.01] * 2)) == once[:3]  # broken off
    assert drive(switch, steps, ramp([0.01] * 3)) == once
    assert [r.generation for r in switch.records] == [0] * 4 + [1] * 3 + [2] * 4


def test_one_step_samplers_always_run_high():
    switch = BitSwitch(SwitchRule(delta=1e30))
    for _ in range(12):
        assert drive(switch, [999.0], [torch.ones(4)]) == [HIGH]


def test_branches_of_guidance_are_one_step():
    """Two calls at a timestep: both run at its bits, and a branch is compared with itself."""
    switch = BitSwitch(SwitchRule(delta=0.05))
    bits = []
    for step in range(5):
        for size in (1.0, 100.0):  # compared with each other, these would change by far more than delta
            chosen, live = switch.begin(torch.tensor([900.0 - step]), "a")
            switch.end(live, [torch.full((4,), size)])
            bits.append(chosen)
    assert bits == [HIGH] * 4 + [LOW] * 6
    assert [record.change for record in switch.records] == [None, None, 0.0, 0.0, 0.0]


def test_generations_that_interleave_do_not_mix():
    steps, calm, wild = [9.0, 8.0, 7.0, 6.0], ramp([0.001] * 3), ramp([9.0] * 3)
    alone = [drive(BitSwitch(SwitchRule()), steps, outputs) for outputs in (calm, wild)]
    assert alone[0] != alone[1]
    for tell in ("context", "shape"):
        switch, bits = BitSwitch(SwitchRule()), ([], [])
        for i, timestep in enumerate(steps):
            for which, outputs in enumerate((calm, wild)):
                with generation(which if tell == "context" else None):
                    shapes = which if tell == "shape" else "same"
                    chosen, live = switch.begin(torch.tensor([timestep]), shapes)
                switch.end(live, [outputs[i]])
                bits[which].append(chosen)
        assert list(bits) == alone


def test_threads_have_generations_of_their_own():
    switch, steps = BitSwitch(SwitchRule()), [9.0, 8.0, 7.0, 6.0]
    results = {}

    def run(name, outputs):
        results[name] = drive(switch, steps, outputs)

    cases = {
        f"{i}-{kind}": ramp([change] * 3)
        for i in range(3)
        for kind, change in (("calm", 0.001), ("wild", 9.0))
    }
    threads = [threading.Thread(target=run, args=case) for case in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outputs in cases.items():
        assert results[name] == drive(BitSwitch(SwitchRule()), steps, outputs)


def test_rules_that_are_none():
    for wrong in (
        {"delta": -0.1},
        {"delta": math.nan},
        {"delta": "0.1"},
        {"high_first": -1},
        {"high_first": 1.5},
    ):
        with pytest.raises(OptionError, match="option"):
            SwitchRule(**wrong)


def test_a_huge_or_infinite_delta_is_a_rule():
    outputs = [torch.ones(4), torch.full((4,), 1e30), torch.ones(4), torch.ones(4)]
    for delta, third in ((1e10, HIGH), (1e300, LOW), (math.inf, LOW), (10**40, LOW)):
        bits = drive(BitSwitch(SwitchRule(delta=delta)), [9.0, 8.0, 7.0, 6.0], outputs)
        assert bits == [HIGH, HIGH, third, LOW]


def test_a_step_out_of_order_begins_a_generation():
    """9, 8, 7 go down; 8 again is no step of theirs, and neither are those that follow it upwards."""
    switch = BitSwitch(SwitchRule(delta=1e30))
    assert drive(switch, [9.0, 8.0, 7.0, 8.0, 6.0], ramp([0.01] * 4)) == [HIGH, HIGH, LOW, HIGH, HIGH]
    assert [(r.generation, r.step) for r in switch.records] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@dataclasses.dataclass(slots=True)
class Output:
    sample: object
    note: str = "no tensor"


OUTPUTS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "list of two": lambda y: [y[..., :4], y[..., 4:]],
    "beside integers": lambda y: (y, torch.arange(int(1e4))),
    "dataclass": Output,
    "dataclass of a tuple": lambda y: Output((y,)),
    "diffusers": lambda y: Transformer2DModelOutput(sample=y),
    "video": lambda y: y.reshape(1, 2, 3, 2, 4),
}


class Moves(torch.nn.Module):
    """Its output moves by a tenth of itself with each step."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, timestep):
        return OUTPUTS[self.kind](x * 1.1 ** (10.0 - float(timestep)))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_kind_of_output_is_measured(kind):
    model, x = Moves(kind), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    vq.switch_bits(model, delta=0.15)
    for timestep in (10.0, 9.0, 8.0, 7.0, 6.0):
        model(x, timestep)
    records = vq.step_records(model)
    assert [r.change for r in records] == [None, None, *[pytest.approx(0.1, rel=1e-4)] * 3]
    assert [r.bits for r in records] == [HIGH, HIGH, LOW, HIGH, LOW]


def test_a_call_that_raises_leaves_its_generation_as_it_was():
    class Fails(Moves):
        fail = False

        def forward(self, x, timestep):
            if self.fail:
                raise RuntimeError("out of memory")
            return super().forward(x, timestep)

    model, x = Fails("tensor"), torch.ones(8)
    vq.switch_bits(model, delta=0.15)
    for timestep in (10.0, 9.0, 8.0):
        model(x, timestep)
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x, 7.0)
    model.fail = False
    for timestep in (10.0, 9.0, 8.0):
        model(x, timestep)
    bits = [r.bits for r in vq.step_records(model)]
    assert bits == [HIGH, HIGH, LOW, HIGH, HIGH, HIGH, LOW], "the next generation starts anew"


WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
"""What brings values of a tensor to Python, and on a device waits for it."""


@contextlib.contextmanager
def counted_waits():
    """Note each time that Python asks a tensor for its values, and treat those on the CPU as if on a device."""
    asked = []

    def counting(name):
        plain = getattr(torch.Tensor, name)

        def ask(self, *args, **kwargs):
            asked.append(name)
            return plain(self, *args, **kwargs)

        return ask

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(switching, "_on_host", lambda tensor: False)
        for name in WAITS:
            patched.setattr(torch.Tensor, name, counting(name))
        yield asked


@pytest.mark.parametrize(
    "how", ["one tensor", "views of one", "a tensor each", "written in place", "in place in inference_mode"]
)
def test_a_step_waits_once_where_its_calls_share_a_timestep(how):
    switch, bits = BitSwitch(SwitchRule(delta=0.05)), []
    with counted_waits() as asked, torch.inference_mode("inference" in how):
        held = torch.empty(2)
        for step in range(6):
            held.fill_(900.0 - step)
            base = held if "in place" in how else torch.full((1,), 900.0 - step)
            one = base if how != "one tensor" else base.expand(2)
            for size in (1.0, 100.0):
                each = {"views of one": base.expand(2), "a tensor each": base.clone()}.get(how, one)
                chosen, live = switch.begin(each, "a")
                switch.end(live, [torch.full((4,), size)])
                bits.append(chosen)
    assert bits == [HIGH] * 4 + [LOW] * 8
    assert len(switch.records) == 6
    assert asked == ["tolist"] * (12 if how == "a tensor each" or "inference" in how else 6)


def test_a_timestep_on_the_host_is_always_read():
    """It costs nothing there, and numpy may have written what no counter shows."""
    values, switch = np.array([900.0]), BitSwitch(SwitchRule())
    held = torch.from_numpy(values)
    for step in range(3):
        values[0] = 900.0 - step
        switch.begin(held, "a")
    assert [record.timestep for record in switch.records] == [900.0, 899.0, 898.0]


class Denoiser(torch.nn.Module):
    """A TinyDiT whose input decides how much the output moves."""

    def __init__(self):
        super().__init__()
        self.body = tiny_dit(1)

    def forward(self, x, timestep):
        return {"sample": self.body(x, timestep)}


def sample(run, x, wild=False):
    """Five steps; the latent drifts a little, or is drawn anew each time."""
    gen = torch.Generator().manual_seed(0)
    outputs = []
    for i in range(5):
        latent = torch.randn(x.shape, generator=gen) if wild else x * (1 + 1e-3 * i)
        outputs.append(run(latent, torch.full((2,), 900.0 - i))["sample"])
    return outputs


def guided(run, x, calls, steps=50):
    """A sampling of 50 steps with guidance as one batch, or as two calls with one timestep."""
    for i in range(steps):
        timestep, latent = torch.full((2,), 990.0 - 19 * i), x * (1 + 2e-2 * i)
        for branch in range(calls):
            run(latent * (1 - 2 * branch), timestep)


def check_fifty_steps(run, x):
    """No compilation and one wait for the device in each step, of which some run low and some high."""
    for calls in (1, 2):
        vq.reset(run)
        before = len(vq.step_records(run))
        compiled = dict(torch._dynamo.utils.counters["stats"]), dict(torch._dynamo.utils.counters["frames"])
        with torch._dynamo.config.patch(error_on_recompile=True), counted_waits() as asked:
            guided(run, x, calls)
        assert asked == ["tolist"] * 50
        assert compiled == (
            dict(torch._dynamo.utils.counters["stats"]),
            dict(torch._dynamo.utils.counters["frames"]),
        )
        bits = [record.bits for record in vq.step_records(run)[before:]]
        assert len(bits) == 50
        assert min(bits.count(LOW), bits.count(HIGH)) >= 5, bits


@pytest.mark.slow
def test_one_compiled_pair_follows_the_rule_without_recompiling():
    torch._dynamo.reset()
    model, (x, _) = Denoiser(), tiny_inputs()
    run = torch.compile(model, backend="viditq", options={"scheme": "dvd-w4a6", "delta": 0.5}, fullgraph=True)
    with torch.no_grad():
        first = sample(run, x)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        sample(run, x, wild=True)
        vq.reset(run)
        again = sample(run, x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
        records = vq.step_records(run)
        check_fifty_steps(run, x)
        with vq.forced_bits("low"):
            low = sample(run, x)
        with vq.forced_bits("high"):
            high = sample(run, x)
    assert len(records) == 15
    assert len(vq.step_records(model)) == 115
    assert [r.bits for r in records[:5]] == [HIGH, HIGH, LOW, LOW, LOW]
    assert [r.bits for r in records[5:10]] == [HIGH] * 5
    assert [r.generation for r in records] == [0] * 5 + [1] * 5 + [2] * 5
    for i, bits in enumerate([HIGH, HIGH, LOW, LOW, LOW]):
        assert torch.equal(first[i], (low if bits == LOW else high)[i])
        assert torch.equal(first[i], again[i])
    assert relative_error(low[0], high[0]) > 0.01  # 4-bit activations are really others


def test_a_model_in_pieces_is_followed_by_hooks():
    """A graph break takes the timestep out of the graph that holds the linears."""
    torch._dynamo.reset()
    model, (x, _) = Denoiser(), tiny_inputs()
    whole = model.body.blocks[0].forward
    model.body.blocks[0].forward = torch._dynamo.disable(
        torch.compile(whole, backend="viditq", options={"scheme": "dvd-w4a6"})
    )
    with torch.no_grad():
        vq.switch_bits(model, delta=0.5)
        vq.switch_bits(model, delta=0.5)  # in its place, not beside it
        sample(model, x)
        bits = [record.bits for record in vq.step_records(model)]
        with pytest.raises(ViditqError, match="without 'timestep'"):
            model(x)
        vq.reset(model)
        sample(model, x)
    assert bits == [HIGH, HIGH, LOW, LOW, LOW]
    assert [r.bits for r in vq.step_records(model)][-5:] == bits
    with pytest.raises(ViditqError, match="no timestep"):
        vq.switch_bits(torch.nn.Linear(4, 4))


def test_copies_and_pickles_of_a_followed_model_have_generations_of_their_own():
    model, (x, _) = tiny_dit(1), tiny_inputs()
    vq.switch_bits(model, delta=0.5)

    def steps(run, *timesteps):
        with torch.no_grad():
            for t in timesteps:
                run(x, torch.full((2,), t))
        return [(r.generation, r.step) for r in vq.step_records(run)]

    assert steps(model, 900.0, 800.0) == [(0, 0), (0, 1)]
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert vq.step_records(other) == []
        assert steps(other, 700.0, 600.0) == [(0, 0), (0, 1)]
        vq.switch_bits(other, delta=0.0)
        assert steps(other, 500.0) == [(0, 0)]
        assert len(other._forward_pre_hooks) == len(other._forward_hooks) == 1
    assert steps(model) == [(0, 0), (0, 1)]
