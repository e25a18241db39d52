"""Scales by position stay with the tokens that they are of: through views, convolutions, batches and files."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import viditq_fx as vq
from tests.small_models import relative_error
from viditq_fx.errors import RecipeError
from viditq_fx.ops.weight_forms import name_of
from viditq_fx.passes.site_plan import check_positions
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import executions

WIDTH, FRAMES, PLACES = 64, 4, 6
TOKENS = FRAMES * PLACES
POSITIONS = {"each": TOKENS, "time": FRAMES, "image": TOKENS, "rows": 1}


class Moves(nn.Module):
    """Linears that read tokens as they come, by frames, as an image and in one batch; each behind a norm."""

    def __init__(self):
        super().__init__()
        self.each, self.time, self.rows = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.image = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        h = x + self.each(norm(x))
        frames = norm(h).unflatten(1, (FRAMES, -1)).transpose(1, 2)
        h = h + self.time(frames).transpose(1, 2).flatten(1, 2)
        image = norm(h).unflatten(1, (FRAMES, -1)).permute(0, 3, 1, 2)
        h = h + self.image(image).permute(0, 2, 3, 1).flatten(1, 2)
        return h + self.rows(norm(h).flatten(0, 1)).unflatten(0, x.shape[:2])


def norm(x):
    return F.layer_norm(x, (WIDTH,))


def moves(seed=0):
    torch.manual_seed(seed)
    return Moves().eval().requires_grad_(False)


def drawn(batch=20, tokens=TOKENS):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(batch))


def compiled(model, recipe, **asked):
    torch._dynamo.reset()
    options = {"recipe": recipe, "strict": True}
    return torch.compile(model, backend="viditq", options=options, fullgraph=True, **asked)


@pytest.fixture(scope="module")
def recipe():
    """Scales that differ 4x over the positions: at another one they would be wrong, and seen to be."""
    model = moves()
    made = vq.calibrate(model, [[drawn()]], scheme="w8a8-position", balance="off", rotation="off")
    assert {path: len(plan.input_scale) for path, plan in made.sites.items()} == POSITIONS
    for path, size in POSITIONS.items():
        made.sites[path].input_scale.mul_(torch.logspace(0, -2, size, base=2))
    return made


class InScheme(nn.Module):
    """`linear` on x that is rounded by position: the formula, in fp32."""

    def __init__(self, linear, scale):
        super().__init__()
        self.linear, self.scale = copy.deepcopy(linear), scale
        weight = self.linear.weight.flatten(1)
        step = weight.abs().amax(1, keepdim=True) / 127
        self.linear.weight.data = ((weight / step).round() * step).reshape(self.linear.weight.shape)

    def forward(self, x):
        image = isinstance(self.linear, nn.Conv2d)
        scale = self.scale.reshape(FRAMES, -1) if image else self.scale[:, None]
        return self.linear((x / scale).round().clamp(-127, 127) * scale)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_layers_are_the_formula_at_every_place(recipe):
    model, layers, want = moves(), moves(), moves()
    for path in POSITIONS:
        setattr(want, path, InScheme(getattr(want, path), recipe.sites[path].input_scale))
    run = compiled(model, recipe)
    vq.quantize_(layers, (drawn(),), recipe=recipe)
    assert {m.scheme.input_range for m in layers.modules() if isinstance(m, QuantLinear)} == {"position"}
    with executions() as ran:
        for batch in (20, 30):
            x = drawn(batch)
            assert relative_error(run(x), want(x)) < 1e-5
            assert relative_error(layers(x), want(x)) < 1e-5
            assert relative_error(want(x), moves()(x)) > 1e-3
    assert {site.outcome for site in ran[0].report.sites} == {"quantized"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_other_sizes_of_the_batch_run_and_of_the_sequence_are_refused(recipe, dynamic):
    model = moves()
    run = compiled(model, recipe, dynamic=dynamic)
    run(drawn(20))
    want = run(drawn(30))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(drawn(30)), want)
        assert run(drawn(40)).isfinite().all()
    for tokens in (TOKENS + FRAMES, FRAMES):
        with pytest.raises(BackendCompilerFailed, match=rf"RecipeError.* for 24 positions .* reads {tokens}"):
            run(drawn(20, tokens))
    assert torch.equal(run(drawn(30)), want)


@torch.no_grad()
def test_layers_refuse_other_sequences_eagerly_and_compiled(recipe):
    layers = moves()
    vq.quantize_(layers, (drawn(),), recipe=recipe)
    for run in (
        layers,
        *(torch.compile(layers, backend="eager", dynamic=dynamic) for dynamic in (None, True)),
    ):
        torch._dynamo.reset()
        assert run(drawn(20)).isfinite().all()
        assert run(drawn(30)).isfinite().all()
        with pytest.raises(RecipeError, match=r"24 positions of a token, and here it reads 28; calibrate at"):
            run(drawn(20, TOKENS + FRAMES))


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("each", 1, r"each: .* for 1 positions .* reads 24"),  # would go for all
        ("rows", 20 * TOKENS, r"rows: .* for 480 positions .* reads 1"),  # as many as there are rows
        ("time", PLACES, r"time: .* for 6 positions .* reads 4"),
        ("image", 5, r"image: .* for 5 positions .* reads 24"),
        ("each", None, r"each: .*scheme 'w8a8-position' takes"),
    ],
)
@torch.no_grad()
def test_a_recipe_of_other_positions_names_the_site(recipe, path, size, message):
    scale = torch.tensor(1.0) if size is None else torch.ones(size)
    plan = replace(recipe.sites[path], input_scale=scale)
    other = replace(recipe, sites={**recipe.sites, path: plan})
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(moves(), other)(drawn())
    layers = moves()
    if size is None:
        with pytest.raises(RecipeError, match=message):
            vq.quantize_(layers, (drawn(),), recipe=other)
        return
    vq.quantize_(layers, (drawn(),), recipe=other)
    with pytest.raises(RecipeError, match=f"for {size} positions of a token, and here it reads"):
        layers(drawn())


def test_a_number_of_tokens_that_is_known_while_running_alone_is_refused():
    tokens = ShapeEnv().create_unbacked_symint()
    with pytest.raises(RecipeError, match=r"^each: .* for 24 positions .* known only while it runs"):
        check_positions("each", 24, tokens)


@torch.no_grad()
def test_a_state_of_layers_loads_where_its_scales_are_by_position_too(recipe):
    def layers(scheme, **scales):
        model, parsed = moves(seed=1), vq.QuantScheme.parse(scheme)
        sites = {
            path: replace(
                plan, scheme=parsed, input_scale=scales.get(path, torch.full_like(plan.input_scale, 0.5))
            )
            for path, plan in recipe.sites.items()
        }
        vq.quantize_(model, (drawn(),), recipe=replace(recipe, sites=sites))
        return model

    saved = moves()
    vq.quantize_(saved, (drawn(),), recipe=recipe)
    state, same = saved.state_dict(), layers("w8a8-position")
    same.load_state_dict(state)
    assert torch.equal(same(drawn()), saved(drawn()))
    assert torch.equal(copy.deepcopy(saved)(drawn()), saved(drawn()))
    with pytest.raises(RuntimeError, match="input scale is of w8a8-position, this layer's of w8a7-position"):
        layers("w8a7-position").load_state_dict(state)
    name = name_of(vq.QuantScheme.parse("w8a8-timestep"))  # as many scales, of something else
    with pytest.raises(RuntimeError, match="input scale is of w8a8-timestep, this layer's of w8a8-position"):
        same.load_state_dict(state | {key: name for key in state if key.endswith("scheme")})
    with pytest.raises(
        RuntimeError, match=r"each\.input_scale: .* \(6,\) expected, got torch\.float32 \(24,\)"
    ):
        layers("w8a8-position", each=torch.ones(6)).load_state_dict(state)
