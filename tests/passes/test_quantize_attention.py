"""Softmax attention: every call form is read, planned or refused with a reason, and rewritten."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import viditq_fx as vq
from tests.small_models import capture, relative_error, targets
from viditq_fx.inspection.breakdown import by_role
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.scheme import QuantScheme

WIDTH, HEADS = 64, 2


class Attention(nn.Module):
    """Projections, what a case puts between them and attention, attention."""

    def __init__(self, attend, between=lambda t: t, kv_heads=HEADS):
        super().__init__()
        head = WIDTH // HEADS
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * head) for _ in range(2))
        self.norm, self.attend, self.between = nn.RMSNorm(head), attend, between

    def forward(self, x, other=None):
        other = x if other is None else other
        head = WIDTH // HEADS
        q, k, v = (
            p(t).unflatten(-1, (-1, head)).transpose(1, 2)
            for p, t in ((self.q, x), (self.k, other), (self.v, other))
        )
        q, k = self.between(q), self.between(k)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)) + x


def report_of(model, *inputs, attention="int8", keep=()):
    gm = capture(model.eval().requires_grad_(False), *inputs)
    ctx = PassContext(scheme=QuantScheme.parse("w8a8"), attention=attention, keep=keep)
    PassPipeline(passes=default_passes()).run(gm, ctx)
    return gm, ctx.report.attention


def masked(mask):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)


def products(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / 4, dim=-1) @ v


def scaled_before_and_cast_after(q, k, v):
    weight = (q * 0.4) @ (0.4 * k).transpose(2, 3)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return weight @ v


def batched(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weight = torch.bmm(q, k.mT).mul(0.2) + PENALTY
    return torch.bmm(F.softmax(weight, -1), v).unflatten(0, (-1, HEADS))


def keys_as_columns(q, k, v):
    return torch.matmul(torch.matmul(q, k.permute(0, 1, 3, 2).contiguous()).softmax(3), v)


PENALTY = torch.randn(20, 20)
TABLE = torch.randn(20, WIDTH // HEADS)
# attend, between, heads of k and v, what the report says
FORMS = {
    "positional": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), None, HEADS, "self"),
    "keywords": (
        lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True, scale=0.2),
        None,
        HEADS,
        "self, causal",
    ),
    "bool mask": (masked(torch.ones(20, 20).tril().bool()), None, HEADS, "self, bool mask"),
    "additive mask": (masked(torch.randn(1, 1, 20, 20)), None, HEADS, "self, additive mask"),
    "grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        None,
        1,
        "self, GQA",
    ),
    "normed": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda t: F.layer_norm(t, (WIDTH // HEADS,)),
        HEADS,
        "self, qk layer_norm",
    ),
    "products": (products, None, HEADS, "self, spelled as products"),
    "scaled before": (scaled_before_and_cast_after, None, HEADS, "self, spelled as products"),
    "batched": (batched, None, HEADS, "self, additive mask, spelled as products"),
    "keys as columns": (keys_as_columns, None, HEADS, "self, spelled as products"),
    "products, normed": (
        products,
        lambda t: F.layer_norm(t, (WIDTH // HEADS,)),
        HEADS,
        "self, qk layer_norm, spelled as products",
    ),
    "rotated": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda t: t * TABLE.cos() + t.flip(-1) * TABLE.sin(),
        HEADS,
        "self, RoPE",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_recognised_and_rewritten(name, monkeypatch):
    attend, between, heads, form = FORMS[name]
    torch.manual_seed(0)
    model, x = Attention(attend, between or (lambda t: t), heads), torch.randn(2, 20, WIDTH)
    gm, (entry,) = report_of(model, x)
    assert (entry.prologue, entry.done, entry.reason) == (form, "int8-qk", None)
    assert "attention_int8" in targets(gm)
    assert not {"scaled_dot_product_attention", "softmax", "matmul", "bmm"} & set(targets(gm))
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    with torch.no_grad():
        got = torch.compile(model, backend="viditq", options={"attention": "int8"})(x)
    assert 0 < relative_error(got, model(x)) < 0.02


def test_cross_attention_is_told_from_self():
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    _, (entry,) = report_of(model, torch.randn(2, 20, WIDTH), torch.randn(2, 33, WIDTH))
    assert entry.prologue == "cross"
    assert (entry.rows, entry.depth, entry.width) == (str(2 * HEADS * 20), WIDTH // HEADS, 33)


@pytest.mark.parametrize(
    ("attend", "options", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), {"attention": "auto"}, "SDPA is faster"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), {"attention": "keep"}, "attention='keep'"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            {"keep": ("attention",)},
            "kept by pattern",
        ),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), {}, "dropout"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float(),
            {},
            "float64",
        ),
        (lambda q, k, v: q.relu() @ (k.relu().mT @ v), {}, "product of two activations"),
    ],
)
def test_what_stays_says_why(attend, options, reason):
    gm, entries = report_of(Attention(attend), torch.randn(2, 20, WIDTH), **options)
    assert all(reason in entry.reason and entry.done is None for entry in entries)
    assert entries
    assert "attention_int8" not in targets(gm)


def test_values_in_int8_are_planned_and_computed(monkeypatch):
    torch.manual_seed(0)
    model, x = Attention(FORMS["positional"][0]), torch.randn(2, 20, WIDTH)
    gm, (entry,) = report_of(model, x, attention="int8-int8")
    assert (entry.planned, entry.done) == ("int8-qk-int8-pv", "int8-qk-int8-pv")
    assert "attention_int8_int8" in targets(gm)
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    with torch.no_grad():
        got = torch.compile(model, backend="viditq", options={"attention": "int8-int8"})(x)
    assert 0 < relative_error(got, model(x)) < 0.02


def test_values_in_fp8_are_refused_where_nothing_multiplies_them():
    model, x = Attention(FORMS["positional"][0]), torch.randn(2, 20, WIDTH)
    gm, (entry,) = report_of(model, x, attention="int8-fp8")
    assert (entry.planned, entry.done, entry.outcome) == ("int8-qk-fp8-pv", None, "refused")
    assert "fp8 needs an NVIDIA GPU" in entry.reason
    assert "attention='int8-int8'" in entry.reason
    assert "scaled_dot_product_attention" in targets(gm)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="fp8 needs an NVIDIA GPU"):
        torch.compile(model, backend="viditq", options={"attention": "int8-fp8", "strict": True})(x)


@pytest.mark.slow
def test_generated_code_and_dynamic_sizes():
    """Through Inductor: one graph for two lengths, the reference as its kernel, named so in the report."""
    torch.manual_seed(0)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)).requires_grad_(False)
    call = torch.compile(model, backend="viditq", options={"attention": "int8"}, dynamic=True, fullgraph=True)
    for tokens in (20, 33):
        x = torch.randn(2, tokens, WIDTH)
        assert relative_error(call(x), model(x)) < 0.02
    report = vq.explain(call, x)
    assert report.graphs == 1
    assert [site.kernel for site in report.attention] == ["simulation: int8 values, fp32 arithmetic"]
    assert [site.outcome for site in report.attention] == ["simulated"]
    (row,) = [row for row in by_role(report) if row.role == "attention"]
    assert (row.quantized, row.simulated, row.flops_quantized) == (0, 1, 0)
    assert "1 attention call simulated" in str(report)


def test_a_wrong_mode_is_a_clear_error():
    with pytest.raises(vq.OptionError, match="option 'attention' is one of"):
        vq.explain(nn.Linear(64, 64), torch.randn(20, 64), options={"attention": "sage"})


def test_an_attention_spelled_as_products_counts_once_and_gives_roles():
    model, x = Attention(products), torch.randn(2, 20, WIDTH)
    _, (entry,) = report_of(model, x, attention="auto")
    _, (called,) = report_of(Attention(FORMS["positional"][0]), x, attention="auto")
    assert (entry.flops, entry.rows, entry.width) == (called.flops, called.rows, called.width)
    assert entry.done is None
    roles = {site.fqn: site.role for site in vq.explain(model, x).sites}
    assert roles == {"q": "attn.q", "k": "attn.k", "v": "attn.v", "out": "attn.out"}


def scores_read_twice(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v + scores.mean()


@pytest.mark.parametrize(
    ("attend", "reasons"),
    [
        (scores_read_twice, ["its scores or probabilities are also read by mean"]),
        (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, ["no softmax attention that we know"] * 2),
        (lambda q, k, v: (q @ k.mT).relu() @ v, ["no softmax attention that we know"] * 2),
        (lambda q, k, v: (q @ k.mT * q.amax()).softmax(-1) @ v, ["no softmax attention that we know"] * 2),
    ],
)
def test_what_is_no_softmax_attention_of_ours_stays(attend, reasons):
    gm, entries = report_of(Attention(attend), torch.randn(2, 20, WIDTH))
    assert "attention_int8" not in targets(gm)
    assert [reason in entry.reason for entry, reason in zip(entries, reasons, strict=True)] == [True] * len(
        reasons
    )


def test_learned_queries_are_attention_too():
    class Resampler(Attention):
        def __init__(self):
            super().__init__(products)
            self.latents = nn.Parameter(torch.randn(1, 24, WIDTH))

        def forward(self, x):
            return super().forward(self.latents.expand(len(x), -1, -1), x)

    _, (entry,) = report_of(Resampler(), torch.randn(2, 20, WIDTH))
    assert (entry.prologue, entry.done) == ("cross, spelled as products", "int8-qk")


def attend(q, k, v, mask=None, scale=0.2):
    scores = q @ k.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def one_head(t):
    return t[:, :1]


def queries_written(q, k, v):
    scores = q @ k.mT
    q.mul_(0.1)
    return scores.softmax(-1) @ v + q


def scaled_in_place_and_read(q, k, v):
    whole = q[:, :, :]
    q *= 0.2
    return (q @ k.mT).softmax(-1) @ v + whole


def mask_collects_scores(q, k, v):
    mask = torch.zeros(2, HEADS, 20, 20)
    seen = mask[..., :1]
    mask += q @ k.mT
    return mask.softmax(-1) @ v + seen


SDPA = F.scaled_dot_product_attention
ROW = torch.randn(20)
BROADCAST, MASK = "operands of shapes", "a mask of shape"


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        pytest.param(lambda q, k, v: attend(q, one_head(k), one_head(v)), BROADCAST, id="one head of keys"),
        pytest.param(
            lambda q, k, v: SDPA(q, one_head(k), one_head(v)), BROADCAST, id="one head of keys, called"
        ),
        pytest.param(lambda q, k, v: attend(q, k[:1], v[:1]), BROADCAST, id="one sample of keys"),
        pytest.param(lambda q, k, v: SDPA(q[:1], k, v), BROADCAST, id="one sample of queries"),
        pytest.param(lambda q, k, v: attend(q, k, v[0]), BROADCAST, id="values of lower rank"),
        pytest.param(lambda q, k, v: attend(q, k, v, ROW), MASK, id="mask of keys"),
        pytest.param(lambda q, k, v: attend(q, k, v, ROW.sum()), MASK, id="mask of one number"),
        pytest.param(
            lambda q, k, v: attend(q[:1], k[:1], v[:1], ROW.expand(2, 1, 20, 20)), MASK, id="more masks"
        ),
        pytest.param(
            lambda q, k, v: attend(q, k, v, PENALTY > 0), "bool mask that is added", id="bool added"
        ),
        pytest.param(queries_written, "written in place", id="queries written"),
        pytest.param(scaled_in_place_and_read, "writes in place", id="queries scaled in place"),
        pytest.param(mask_collects_scores, "writes in place", id="mask written"),
        pytest.param(
            lambda q, k, v: (q @ k.mT).softmax(-1).mul(9).to(torch.int32).to(v.dtype) @ v,
            "no softmax attention that we know",
            id="probabilities rounded",
        ),
    ],
)
def test_forms_that_the_op_does_not_have_stay(attend, reason):
    torch.manual_seed(0)
    model, x = Attention(attend), torch.randn(2, 20, WIDTH)
    gm, entries = report_of(model, x)
    assert "attention_int8" not in targets(gm)
    assert entries
    assert all(reason in entry.reason for entry in entries), entries


def upcast(q, k, v):
    return (q.float() @ k.float().mT * 0.2).softmax(-1).to(v.dtype) @ v


def scores_written(q, k, v):
    scores = q @ k.mT * 0.2
    scores += PENALTY
    return scores.softmax(-1) @ v


def autocast(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heads = SDPA(q, k, v)
    return (heads @ torch.eye(WIDTH // HEADS, dtype=torch.bfloat16)).to(q.dtype)


@pytest.mark.parametrize(
    ("attend", "dtype"),
    [(upcast, torch.bfloat16), (autocast, torch.float32), (scores_written, torch.float32)],
)
def test_the_result_has_the_dtype_and_values_that_the_model_gives_it(attend, dtype, monkeypatch):
    """What follows, here in full precision, may take no other dtype."""
    torch.manual_seed(0)
    model = Attention(attend).to(dtype).eval().requires_grad_(False)
    x = torch.randn(2, 20, WIDTH, dtype=dtype)
    _, (entry,) = report_of(model, x, keep=("out",))
    assert entry.done == "int8-qk"
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    got = torch.compile(model, backend="viditq", options={"attention": "int8", "keep": ["out"]})(x)
    assert got.dtype == dtype
    assert relative_error(got, model(x)) < 0.02
