"""calibrate: sites are the compiler's, statistics are those of plain hooks, and the model is left as it was."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.small_models import TinyDiT, tiny_dit, tiny_inputs
from viditq_fx.calibration import reservoir, statistics
from viditq_fx.calibration.ledger import Ledger
from viditq_fx.calibration.run import collect
from viditq_fx.runtime import executions

STEPS = (900.0, 500.0, 10.0)


def calls(model, steps=STEPS, tokens=40):
    """A function that samples: a call at each of these steps."""
    x, _ = tiny_inputs(tokens=tokens)

    def run():
        for step in steps:
            model(x * (1 + step), timestep=torch.full((2,), step))

    return run


def hooked(model, run):
    """Path -> what each linear of the model reads, by plain hooks."""
    read = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: read.setdefault(path, []).append(args[0]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return read


def state(recipe):
    """All of a recipe that can be compared."""
    return {
        path: (str(p.scheme), p.rotation, p.reason, _values(p.multiplier), _values(p.input_scale))
        for path, p in recipe.sites.items()
    }


def _values(tensor):
    return None if tensor is None else tensor.tolist()


def test_sites_are_those_of_quantize_and_of_the_backend():
    model = tiny_dit()
    recipe = vq.calibrate(model, calls(model), balance="off", rotation="off")
    with executions() as ran, torch.no_grad():
        torch.compile(model, backend="viditq")(*tiny_inputs())
    compiled = {site.fqn for run in ran for site in run.report.sites if site.planned}
    swapped = vq.quantize_(model, tiny_inputs())
    assert set(recipe.sites) == compiled == {site.fqn for site in swapped.sites if site.done}
    assert set(recipe.shapes) == {site.fqn for site in swapped.sites}
    assert recipe.provenance["calls"] == 3


def test_statistics_are_those_of_plain_hooks():
    model = tiny_dit(layers=1)
    found = collect(model, calls(model))
    read = hooked(model, calls(model))
    assert [b.low for b in found.buckets.items] == sorted(STEPS)
    for path in ("blocks.0.v", "blocks.0.out", "blocks.0.up", "blocks.0.down"):
        group = found.group(path)
        for bucket, x in zip(reversed(found.buckets.items), read[path], strict=True):
            seen, rows = group.at(bucket), x.flatten(0, 1)
            assert seen.count == len(rows)
            assert torch.equal(seen.low, rows.amin(0))
            assert torch.equal(seen.high, rows.amax(0))
            assert torch.equal(seen.amax, rows.abs().amax(0))
            torch.testing.assert_close(seen.mean, rows.double().mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                seen.variance, rows.double().var(0, correction=0), rtol=1e-3, atol=1e-6
            )
            token = rows.abs().amax(1)
            low, median, high = seen.token_ranges()
            assert (low, high) == (float(token.min()), float(token.max()))
            assert median == pytest.approx(float(token.median()), rel=0.1)
        everything = torch.cat([x.flatten(0, 1) for x in read[path]])
        kept = group.reservoir()
        assert kept.rows_RK.shape == (64, everything.shape[1])
        assert (kept.rows_RK[:, None] == everything).all(-1).any(1).all()  # rows that were really there
        assert len(set(kept.timesteps)) == 3
    assert found.group("blocks.0.q").sites == ("blocks.0.k", "blocks.0.q", "blocks.0.v")


def test_branches_are_halves_of_the_batch():
    model = tiny_dit(layers=1)
    x, _ = tiny_inputs()
    x = torch.cat([x[:1], 3 * x[:1]])
    found = collect(model, lambda: model(x, timestep=torch.full((2,), 5.0)), branches=2)
    first = hooked(model, lambda: model(x, timestep=torch.full((2,), 5.0)))["blocks.0.out"][0]
    (bucket,) = found.buckets.items
    for branch in (0, 1):
        assert torch.equal(found.group("blocks.0.out").at(bucket, branch).amax, first[branch].abs().amax(0))


def test_more_timesteps_than_buckets_merge_neighbours():
    model = tiny_dit(layers=1)
    found = collect(model, calls(model, (1.0, 0.5, 0.48, 0.1, 0.09)), max_buckets=3)
    assert [(b.low, b.high) for b in found.buckets.items] == [
        pytest.approx(pair) for pair in ((0.09, 0.1), (0.48, 0.5), (1.0, 1.0))
    ]
    assert [found.group("blocks.0.up").at(b).count for b in found.buckets.items] == [160, 160, 80]
    assert found.buckets.edges() == pytest.approx((0.29, 0.75))


class Timed(nn.Module):
    """A linear whose rows grow with the timestep, under whatever name and form that comes."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x, t=None):
        h = F.scaled_dot_product_attention(*[self.stem(x)[None]] * 3)[0]
        scale = 1.0 if t is None else 1 + t.to(x.dtype).max() / 500
        return self.head(F.gelu(self.body(h * scale)))


@pytest.mark.parametrize(
    "steps",
    [
        [torch.tensor(v) for v in (0, 500, 999)],
        [torch.full((3, 7), v, dtype=torch.bfloat16) for v in (1.0, 0.5, 0.25)],
        [torch.tensor([0.0, v, 1.0 - 1.0]) for v in (0.1, 0.6, 0.9)],
    ],
)
def test_a_timestep_may_have_any_form(steps):
    torch.manual_seed(0)
    model, x = Timed().eval(), torch.randn(40, 8)
    recipe = vq.calibrate(
        model, [((x, t), {}) for t in steps], scheme="w8a8-timestep", balance="off", rotation="off"
    )
    read = hooked(model, lambda: [model(x, t) for t in steps])["body"]
    largest = [
        float(rows.abs().max()) for _, rows in sorted(zip([float(t.max()) for t in steps], read, strict=True))
    ]
    assert recipe.timestep == "t"
    assert len(recipe.edges) == 2
    assert recipe.sites["body"].input_scale.tolist() == pytest.approx([v / 127 for v in largest])


def test_without_a_timestep_only_the_scheme_that_needs_one_fails():
    torch.manual_seed(0)
    model, x = Timed().eval(), torch.randn(40, 8)
    recipe = vq.calibrate(model, lambda: model(x), scheme="w8a8-static", balance="off", rotation="off")
    assert recipe.edges == ()
    assert recipe.timestep is None
    assert recipe.sites["body"].input_scale.shape == ()
    with pytest.raises(vq.RecipeError, match="'t' was None in every call"):
        vq.calibrate(model, lambda: model(x), scheme="w8a8-timestep")
    with pytest.raises(vq.RecipeError, match="some calls of the model have a timestep and others have none"):
        vq.calibrate(model, lambda: (model(x), model(x, torch.tensor(3))))
    untimed = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(vq.RecipeError, match=r"Sequential.forward has no argument timestep"):
        vq.calibrate(untimed, lambda: untimed(torch.randn(40, 64)), scheme="w8a8-timestep")


class Broken(TinyDiT):
    """A graph break between the blocks."""

    def forward(self, x, timestep):
        condition = self.time(torch.cat([timestep[:, None].sin().expand(-1, 32)], dim=-1))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, condition)
            torch._dynamo.graph_break()
        return self.head(x)


def test_a_model_with_graph_breaks_and_several_sizes():
    torch.manual_seed(0)
    model = Broken().eval()
    found = collect(model, lambda: [calls(model, (5.0,), tokens=n)() for n in (20, 40, 56)])
    read = hooked(model, lambda: [calls(model, (5.0,), tokens=n)() for n in (20, 40, 56)])
    assert found.unseen == ("stem", "time", "head")  # Dynamo leaves a loop that breaks to Python
    for path in ("blocks.0.q", "blocks.1.down"):
        rows = torch.cat([x.flatten(0, 1) for x in read[path]])
        assert found.group(path).whole().count == len(rows)
        assert torch.equal(found.group(path).whole().amax, rows.abs().amax(0))


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks", "block wrappers", "optimized and broken"])
def test_a_model_that_is_compiled_already_is_watched_and_left_so(how):
    model = Broken().eval() if how == "optimized and broken" else tiny_dit()
    plain = collect(model, calls(model, (5.0,)))
    given = model
    if how == "wrapped":
        given = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "blocks":
        for block in model.blocks:
            block.compile(backend="eager")
    else:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, backend="eager")
    run = calls(given, (5.0,))
    run()
    before = [dict(m.__dict__) for m in (given, *model.modules())]
    found = collect(given, run)
    assert found.unseen == plain.unseen
    for path in ("blocks.0.up", "blocks.1.up"):
        assert torch.equal(found.group(path).whole().amax, plain.group(path).whole().amax)
    for module, was in zip((given, *model.modules()), before, strict=True):
        assert module.__dict__.keys() == was.keys()
        assert all(module.__dict__[k] is was[k] for k in ("forward", "_compiled_call_impl") if k in was)
    run()


def test_an_error_or_an_interruption_leaves_the_model_as_it_was():
    model = tiny_dit(layers=1)

    def run():
        calls(model)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vq.calibrate(model, run)
    assert "_compiled_call_impl" not in model.__dict__


def test_nothing_of_the_model_is_held_afterwards():
    model = Broken().eval()
    with pytest.warns(UserWarning, match="reached 3 linear layers"):
        recipe = vq.calibrate(model, calls(model, (5.0,)), balance="off", rotation="off")
    gone = weakref.ref(model.blocks[0].up.weight)
    del model
    gc.collect()
    assert gone() is None
    assert recipe.sites


def test_the_same_samples_give_the_same_recipe_and_the_seed_counts():
    model = tiny_dit(layers=1)
    recipes = [vq.calibrate(model, calls(model), scheme="w4a8", seed=seed) for seed in (3, 3, 4)]
    assert state(recipes[0]) == state(recipes[1])
    assert state(recipes[0]) != state(recipes[2])


def test_inference_mode_autocast_and_bfloat16():
    model = tiny_dit(layers=1).to(torch.bfloat16)
    x, t = tiny_inputs()

    def run():
        with torch.inference_mode():
            model(x.to(torch.bfloat16), timestep=t)
        with torch.autocast("cpu", torch.bfloat16):
            model(x.to(torch.bfloat16), timestep=t)

    recipe = vq.calibrate(model, [run, run], scheme="w8a8-static", rotation="on")
    assert all(plan.rotation > 1 and plan.input_scale > 0 for plan in recipe.sites.values())


def test_mistakes_are_told():
    model, x = tiny_dit(layers=1), tiny_inputs()[0]
    good = calls(model)
    for run, message in [
        (5, "run is a function without arguments"),
        ("lambda", "run is a function without arguments"),
        ([5], "sample 0 is int"),
        (
            [(x, torch.ones(2))],
            r"a tuple \(Tensor, Tensor\), which means \(args, kwargs\).* \[x, t\], or as \(\(x, t\)",
        ),
        ([((x,),)], r"a tuple \(tuple\)"),
        ([], "run holds no sample"),
        (lambda: None, "never called this TinyDiT"),
        (lambda: model(x * torch.nan, timestep=torch.ones(2)), "'blocks.0.k' reads NaN or infinity"),
        (lambda: model(x, timestep=torch.full((2,), torch.inf)), "'timestep' is inf"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            vq.calibrate(model, run)
    for options, message in [
        ({"rows": 0}, "rows=0 keeps no rows"),
        ({"rows": -1}, "rows=-1; give a whole number from 0 up"),
        ({"branches": 7}, "80 rows, which are no 7 equal branches"),
        ({"balance": 2.0}, "balance=2.0"),
        ({"rotation": "yes"}, "rotation='yes'"),
        ({"alpha": 0.4, "alpha_repo": 0.6}, "alpha and alpha_repo say the same"),
        ({"timestep": "sigma"}, "'sigma' is no argument of TinyDiT.forward; it takes x, timestep"),
        ({"progress": 5}, "progress=5"),
        ({"keep": "*"}, "none of the linears of this TinyDiT is to be quantized"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            vq.calibrate(model, good, **options)
    with pytest.raises(vq.RecipeError, match=r"expected a torch.nn.Module"):
        vq.calibrate(model.forward, good)
    with pytest.raises(vq.RecipeError, match="give a list or a function, not a generator"):
        vq.calibrate(model, (s for s in [good]), scheme="w8a8-static")


def test_a_list_is_positional_arguments():
    model, (x, t) = tiny_dit(layers=1), tiny_inputs()
    options = {"balance": "off", "rotation": "off", "scheme": "w8a8-static"}
    listed, paired = (vq.calibrate(model, [s], **options) for s in ([x, t], ((x, t), {})))
    assert state(listed) == state(paired)


@pytest.mark.parametrize("name", ["blocks.0.up.weight", "blocks.0.v.bias", "time.weight"])
def test_a_weight_that_is_not_finite_is_blamed_and_not_who_reads_its_output(name):
    model = tiny_dit(layers=1)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = torch.nan
    with pytest.raises(vq.RecipeError, match=f"'{name}' of this TinyDiT holds NaN or infinity"):
        vq.calibrate(model, calls(model))


def test_layers_that_no_call_reached_are_named():
    model = tiny_dit(layers=1)
    model.idle = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="'idle': they have no plan"):
        recipe = vq.calibrate(model, calls(model), balance="off", rotation="off")
    assert recipe.provenance["unseen"] == ["idle"]


class TwoWeights(nn.Module):
    """One module with two weights of its own, of different K."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 64), nn.Linear(64, 8)
        self.a, self.b = (nn.Parameter(torch.randn(n, k)) for n, k in ((32, 64), (64, 32)))

    def forward(self, x):
        h = F.scaled_dot_product_attention(*[self.stem(x)] * 3)
        return self.head(h + F.linear(F.gelu(F.linear(h, self.a)), self.b))


def test_one_path_with_two_widths_gets_no_transform():
    torch.manual_seed(0)
    model = TwoWeights().eval()
    recipe = vq.calibrate(model, lambda: model(torch.randn(1, 40, 8)), scheme="w8a8-static")
    assert set(recipe.sites) == {""}
    assert recipe.sites[""].multiplier is None
    assert "different K" in recipe.sites[""].reason


class Fallible(nn.Module):
    """A graph whose linear is never reached where `index` names no row."""

    def __init__(self):
        super().__init__()
        self.emb, self.a, self.b = nn.Embedding(4, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, index, flag):
        return self.b(self.emb(index)) if flag else self.a(self.emb(index))


def test_a_call_that_fails_and_is_caught_leaves_nothing():
    model = Fallible()

    def run():
        with pytest.raises(IndexError):
            model(torch.full((1, 40), 9), True)
        model(torch.ones(1, 40, dtype=torch.int64), False)

    assert set(vq.calibrate(model, run, scheme="w8a8").sites) == {"a"}


def test_room_for_all_inputs_is_made_before_a_graph_runs(monkeypatch):
    """What is kept must not lie between activations: see kept.py."""
    made = []

    def note(owner, name, what):
        original = getattr(owner, name)

        def noted(*given, **named):
            made.append(what)
            return original(*given, **named)

        monkeypatch.setattr(owner, name, noted)

    note(statistics, "kept_zeros", "room")
    note(reservoir, "kept_zeros", "room")
    note(Ledger, "see", "seen")
    model = tiny_dit(layers=1)
    collect(model, calls(model, STEPS[:1]))
    first, last = made.index("seen"), len(made) - made[::-1].index("seen")
    assert made[:first].count("room") == 2 * made.count("seen")  # statistics and rows
    assert "room" not in made[first:last]
