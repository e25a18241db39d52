"""Recipes on disk: what is saved is what is loaded, and nothing hostile is let in."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import viditq_fx as vq
from tests.small_models import tiny_dit
from viditq_fx.recipe_file import read_recipe, write_recipe

W4, STEP, PLACE = map(vq.QuantScheme.parse, ("w4a8-rot", "w8a8-timestep", "w8a8-position"))


def recipe():
    """One of everything."""
    shared = torch.randn(64, generator=torch.Generator().manual_seed(0))
    return vq.Recipe(
        scheme=STEP,
        sites={
            "blocks.0.k": vq.SitePlan(scheme=W4, multiplier=shared, rotation=16, reason='best of "four" · ∅'),
            "blocks.0.q": vq.SitePlan(scheme=W4, multiplier=shared, rotation=16),
            "blocks.0.up": vq.SitePlan(scheme=STEP, input_scale=torch.tensor([0.1, 1e-30, 3.0])),
            "blocks.0.out": vq.SitePlan(scheme=PLACE, input_scale=torch.tensor([0.5, 0.25])),
            "head": vq.SitePlan(scheme=None),
            "../../etc/passwd\n": vq.SitePlan(scheme=vq.QuantScheme.parse("dvd-w4a4")),
        },
        keep=("*.ff.net.2", "head"),
        edges=(0.1 + 0.2, 700.0),
        timestep="timestep",
        provenance={"model": "x.Y", "options": {"rows": 64, "balance": 0.1}, "unseen": []},
        shapes={"blocks.0.q": (64, 64), "head": (8, 64)},
    )


def test_round_trip_is_exact(tmp_path):
    first = recipe()
    first.save(tmp_path / "a")
    loaded = vq.Recipe.load(tmp_path / "a")
    for name in ("scheme", "keep", "edges", "timestep", "provenance", "shapes"):
        assert getattr(loaded, name) == getattr(first, name)
    assert loaded.sites.keys() == first.sites.keys()
    for path, plan in first.sites.items():
        found = loaded.sites[path]
        assert (plan.scheme, plan.rotation, plan.reason) == (found.scheme, found.rotation, found.reason)
        for a, b in ((plan.multiplier, found.multiplier), (plan.input_scale, found.input_scale)):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert loaded.sites["blocks.0.q"].multiplier is loaded.sites["blocks.0.k"].multiplier
    loaded.save(tmp_path / "b")
    for name in ("recipe.json", "recipe.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["recipe.json", "recipe.safetensors"]
    lines = (tmp_path / "a" / "recipe.json").read_text().splitlines()
    assert '   "scheme": "w4a8-rot"' in lines  # a line a value: two recipes can be compared with diff


def test_a_recipe_without_tensors(tmp_path):
    vq.Recipe(scheme=vq.QuantScheme.parse("w8a8")).save(tmp_path)
    assert vq.Recipe.load(tmp_path).sites == {}


def refused(folder, *messages):
    with pytest.raises(vq.RecipeError) as caught:
        vq.Recipe.load(folder)
    for message in messages:
        assert message in str(caught.value)


def test_files_that_are_missing_damaged_or_of_two_recipes(tmp_path):
    refused(tmp_path / "none", "none: does not exist")
    recipe().save(tmp_path / "a")
    refused(tmp_path / "a" / "recipe.json", "is a file, not a recipe's folder")
    text, tensors = tmp_path / "a" / "recipe.json", tmp_path / "a" / "recipe.safetensors"
    whole, content = text.read_bytes(), tensors.read_bytes()
    for damaged in (
        b"",
        whole[:-20],
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        whole.replace(b"0.1", b"NaN"),
        whole.replace(b"700.0", b"1e999"),
    ):
        text.write_bytes(damaged)
        refused(tmp_path / "a", "recipe.json", "calibrate again")
    text.write_bytes(b'{"keep": [], "keep": []}')
    refused(tmp_path / "a", "a key occurs twice")
    text.write_bytes(whole)
    for damaged in (b"", content[:-1], content[:-1] + b"\x00\x01"):
        tensors.write_bytes(damaged)
        refused(tmp_path / "a", "recipe.safetensors", "is damaged, or of another recipe")
    tensors.unlink()
    refused(tmp_path / "a", "recipe.safetensors: is missing")
    os.mkfifo(tensors)
    refused(tmp_path / "a", "recipe.safetensors: is no plain file")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(vq.RecipeError, match="cannot write the recipe"):
        recipe().save(tmp_path / "file")
    for value in (torch.nan, {1, 2}, "\ud800"):
        with pytest.raises(vq.RecipeError, match="cannot write the recipe"):
            vq.Recipe(scheme=W4, provenance={"odd": value}).save(tmp_path / "odd")
    assert not list(tmp_path.glob("odd/*.json"))


def changed(tmp_path, change, tensors=None):
    """A folder whose JSON went through `change`, its digest right."""
    recipe().save(tmp_path / "good")
    document, found = read_recipe(tmp_path / "good")
    head = {name: document.pop(name) for name in ("format", "version", "tensors_sha256")}
    change(document)
    write_recipe(tmp_path / "bad", document, {**found, **(tensors or {})})
    del head
    return tmp_path / "bad"


Q = "blocks.0.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), "version 3; this viditq_fx reads versions 1 and 2"),
        (lambda d: d.update(version=1.0), "version 1.0"),
        (lambda d: d.update(version=2), "'range_edges' part the timestep into ranges, and there are none"),
        (lambda d: d.update(range_edges=[1]), "unknown entries 'range_edges'"),
        (lambda d: d.update(version=True), "version True"),
        (lambda d: d.update(format="pickle"), "format 'pickle' is not 'viditq_fx.recipe'"),
        (lambda d: d.update(scheme="w3a3"), "weights have"),
        (lambda d: d.pop("scheme"), "'scheme' is missing"),
        (lambda d: d.update(keep="all"), "'keep' is a string, not a list"),
        (lambda d: d.update(keep=[3]), "'keep' holds a whole number, not a string"),
        (lambda d: d.update(edges=[2, 1]), "'edges' are finite numbers in rising order"),
        (lambda d: d.update(edges=[10**400]), "a number that is too large"),
        (lambda d: d.update(edges=[1]), "'input_scale' has shape (3,); scheme w8a8-timestep"),
        (lambda d: d.update(timestep=7), "'timestep' is a whole number, not a string"),
        (lambda d: d.update(sites=[]), "'sites' is a list, not an object"),
        (lambda d: d.update(extra=1), "unknown entries 'extra'"),
        (lambda d: d["sites"].update(x=None), "'x': is missing, not an object"),
        (lambda d: d["sites"][Q].update(rotation=8), "'rotation' is a power of 4, not 8"),
        (lambda d: d["sites"][Q].update(rotation=-4), "'rotation' is a power of 4, not -4"),
        (
            lambda d: d["sites"][Q].update(rotation=256),
            "blocks of 'rotation' 256 do not divide the 64 channels",
        ),
        (lambda d: d["sites"][Q].update(rotation=4.0), "'rotation' is a number, not a whole number"),
        (lambda d: d["sites"][Q].update(rotation=True), "'rotation' is true or false"),
        (
            lambda d: d["sites"][Q].update(multiplier="../x"),
            "a tensor '../x' that recipe.safetensors does not hold",
        ),
        (lambda d: d["sites"][Q].update(command="rm"), "unknown entries 'command'"),
        (
            lambda d: d["sites"][Q].update(scheme="w8a8-static"),
            "'input_scale' has shape None; scheme w8a8-rot-static",
        ),
        (lambda d: d["sites"][Q].update(reason=[]), "'reason' is a list"),
        (lambda d: d["shapes"].update(x=[1]), "'x' is [N, K]"),
        (lambda d: d["shapes"].update(x=[-1, 5]), "'x' is [N, K]"),
    ],
)
def test_json_of_the_wrong_kind(tmp_path, change, message):
    folder = changed(tmp_path, change)
    text = folder / "recipe.json"
    assert json.loads(text.read_text())["sites"] is not None
    refused(folder, str(text), message.replace("w8a8-rot-static", "w8a8-static"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((64,), torch.nan), "holds NaN or infinity"),
        (torch.full((64,), torch.inf), "holds NaN or infinity"),
        (torch.zeros(64), "'multiplier' holds 0"),
        (torch.ones(64, dtype=torch.float64), "is torch.float64, not torch.float32"),
        (torch.ones(64, dtype=torch.int64), "is torch.int64"),
        (torch.ones(8, 8), "'multiplier' is one number for each channel, not (8, 8)"),
        (torch.ones(()), "'multiplier' is one number for each channel, not ()"),
        (torch.ones(0), "'multiplier' is one number for each channel, not (0,)"),
    ],
)
def test_tensors_that_no_site_can_have(tmp_path, tensor, message):
    refused(changed(tmp_path, lambda d: None, {"blocks.0.k:multiplier": tensor}), "'blocks.0.k'", message)
    refused(
        changed(tmp_path, lambda d: None, {"blocks.0.up:input_scale": -torch.ones(3)}),
        "'input_scale' is above 0",
    )
    name = "blocks.0.out:input_scale"
    for value in (torch.ones(()), torch.ones(0), torch.ones(2, 1)):
        message = f"'input_scale' has shape {tuple(value.shape)}; scheme w8a8-position"
        refused(changed(tmp_path, lambda d: None, {name: value}), "'blocks.0.out'", message)
    changed(tmp_path, lambda d: None, {name: torch.ones(7)})
    assert len(vq.Recipe.load(tmp_path / "bad").sites["blocks.0.out"].input_scale) == 7


def test_a_header_that_promises_too_much(tmp_path):
    import hashlib

    recipe().save(tmp_path)
    document = json.loads((tmp_path / "recipe.json").read_text())
    good = save({"x": torch.ones(4)})
    for header in (
        b'{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}',
        b'{"x":{"dtype":"F32","shape":[9,9],"data_offsets":[0,16]}}',
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999]}}',
        b'{"x":{"dtype":"PICKLE","shape":[4],"data_offsets":[0,16]}}',
        b"[]",
    ):
        content = len(header).to_bytes(8, "little") + header + good[-16:]
        (tmp_path / "recipe.safetensors").write_bytes(content)
        document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        (tmp_path / "recipe.json").write_text(json.dumps(document))
        refused(tmp_path, "recipe.safetensors", "is no safetensors file")


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_PLACES = [
    ("scheme",),
    ("keep",),
    ("edges",),
    ("timestep",),
    ("sites",),
    ("shapes",),
    ("provenance",),
    ("sites", Q),
]
_PLACES += [("sites", Q, name) for name in ("scheme", "rotation", "multiplier", "input_scale", "reason")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(_PLACES), value=_json)
def test_any_json_anywhere_loads_or_is_a_recipe_error(tmp_path, place, value):
    def change(document):
        *path, last = place
        for step in path:
            document = document[step]
        document[last] = value

    try:
        loaded = vq.Recipe.load(changed(tmp_path, change))
    except vq.RecipeError as raised:
        error = raised
    else:
        error = None
    if error is not None:
        assert "recipe.json" in str(error)
    else:
        assert isinstance(loaded.scheme, vq.QuantScheme)
        assert all(isinstance(plan, vq.SitePlan) for plan in loaded.sites.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_anywhere_load_as_they_were_or_are_a_recipe_error(tmp_path, data):
    recipe().save(tmp_path)
    file = tmp_path / data.draw(st.sampled_from(["recipe.json", "recipe.safetensors"]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    file.write_bytes(content)
    error = None
    try:
        vq.Recipe.load(tmp_path)
    except vq.RecipeError as raised:
        error = raised
    assert error is None or str(tmp_path) in str(error)


def test_check_lists_what_does_not_fit():
    model = tiny_dit(layers=1)
    shapes = {p: tuple(m.weight.shape) for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    plan = vq.SitePlan(scheme=W4)
    fits = vq.Recipe(scheme=W4, sites={"blocks.0.up": plan}, shapes=shapes)
    assert str(fits.check(model)) == "  nothing differs"
    assert fits.check(torch.compile(model)).extra == ()

    wrong = {**shapes, "blocks.0.up": (256, 32), "blocks.7.up": (4, 4)}
    del wrong["blocks.0.q"]
    recipe = vq.Recipe(scheme=W4, sites={"gone": plan, "blocks.0.up": plan}, shapes=wrong)
    with pytest.raises(vq.RecipeError) as caught:
        recipe.check(model, strict=False)
    assert str(caught.value).splitlines() == [
        "the recipe does not fit this TinyDiT:",
        "  blocks.7.up: the model has no such module",
        "  gone: the model has no such module",
        "  blocks.0.up: [N, K] = [256, 32] in the recipe, [256, 64] here",
        "  blocks.0.q: calibration never saw this linear",
    ]
    part = vq.Recipe(scheme=W4, sites={"blocks.0.up": plan}, shapes={"blocks.0.up": (256, 64)})
    assert "blocks.0.q" in part.check(model, strict=False).extra
    with pytest.raises(vq.RecipeError, match=r"blocks.0.q: calibration never saw this linear"):
        part.check(model)
    vq.quantize_(model, (torch.randn(2, 40, 8), torch.ones(2)))
    assert str(fits.check(model)) == "  nothing differs"


W8, W4R, W8R = (vq.QuantScheme.parse(name) for name in ("w8a8", "w4a8-rot", "w8a8-rot"))


def ranged():
    """A recipe whose sites have other schemes at other timesteps."""
    signs = torch.randn(64, generator=torch.Generator().manual_seed(0))
    static = [vq.QuantScheme.parse(name) for name in ("w4a8-static", "w8a8-static", "w8a8-static")]
    return vq.Recipe(
        scheme=W8,
        sites={
            Q: vq.SitePlan(scheme=W4R, multiplier=signs, rotation=16, by_range=(W4R, W8R, W4R), reason="x"),
            "up": vq.SitePlan(scheme=static[0], input_scale=torch.tensor(0.5), by_range=tuple(static)),
            "out": vq.SitePlan(scheme=W8),
        },
        edges=(3.0,),
        range_edges=(0.25, 0.5),
        timestep="t",
    )


def test_schemes_by_range_come_back_and_a_range_is_a_recipe_of_its_own(tmp_path):
    first = ranged()
    first.save(tmp_path / "a")
    document = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert (document["version"], document["range_edges"]) == (2, [0.25, 0.5])
    assert document["sites"][Q]["schemes"] == ["w4a8-rot", "w8a8-rot", "w4a8-rot"]
    assert "scheme" not in document["sites"][Q]
    loaded = vq.Recipe.load(tmp_path / "a")
    assert (loaded.ranges, loaded.range_edges, loaded.edges) == (3, (0.25, 0.5), (3.0,))
    assert {path: plan.by_range for path, plan in loaded.sites.items()} == {
        path: plan.by_range for path, plan in first.sites.items()
    }
    loaded.save(tmp_path / "b")
    for name in ("recipe.json", "recipe.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    middle = loaded.at_range(1)
    assert (middle.ranges, middle.sites[Q].scheme, middle.sites[Q].rotation) == (1, W8R, 16)
    assert middle.sites[Q].multiplier is loaded.sites[Q].multiplier
    assert middle.sites["up"].input_scale is loaded.sites["up"].input_scale
    middle.save(tmp_path / "c")
    plain = json.loads((tmp_path / "c" / "recipe.json").read_text())
    assert (plain["version"], "range_edges" in plain) == (1, False)
    with pytest.raises(vq.RecipeError, match=r"at_range\(3\): the recipe has ranges 0 to 2"):
        loaded.at_range(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=1), "unknown entries 'range_edges'"),
        (lambda d: d.pop("range_edges"), "'range_edges' part the timestep"),
        (lambda d: d.update(range_edges=[]), "'range_edges' part the timestep"),
        (lambda d: d.update(range_edges=[0.5, 0.25]), "'range_edges' are finite numbers in rising order"),
        (lambda d: d.update(range_edges=[0.5, "x"]), "'range_edges' holds a string, not a number"),
        (
            lambda d: d.update(range_edges=[0.5]),
            "names 3 schemes by range of the timestep, and there are 2 ranges",
        ),
        (lambda d: d["sites"][Q].update(scheme="w8a8"), "unknown entries 'scheme'"),
        (lambda d: d["sites"][Q].update(schemes=[]), "'schemes' is empty"),
        (lambda d: d["sites"][Q].update(schemes=None), "'schemes' is empty"),
        (lambda d: d["sites"][Q].update(schemes="w8a8"), "'schemes' is a string, not a list"),
        (lambda d: d["sites"][Q].update(schemes=["w8a8", None, "w8a8"]), "'schemes' holds missing"),
        (lambda d: d["sites"][Q].update(schemes=["w8a8", "w3a3", "w8a8"]), "weights have"),
        (lambda d: d["sites"][Q].update(rotation=1), "names schemes with -rot, and no rotation"),
        (lambda d: d["sites"]["up"].update(schemes=["w4a8-static", "w8a8", "w8a8"]), "one width of integers"),
        (
            lambda d: d["sites"]["up"].update(schemes=["w4a4-static", "w8a8-static", "w8a8-static"]),
            "one width of integers",
        ),
    ],
)
def test_ranges_that_no_recipe_can_have(tmp_path, change, message):
    ranged().save(tmp_path / "good")
    document, tensors = read_recipe(tmp_path / "good")
    document = {name: value for name, value in document.items() if name not in ("format", "tensors_sha256")}
    change(document)
    write_recipe(tmp_path / "bad", document, tensors)
    refused(tmp_path / "bad", "recipe.json", message)


def test_ranges_made_by_hand_are_checked():
    plan = vq.SitePlan(scheme=W8, by_range=(W8, W4R))
    for asked, message in [
        ({"sites": {"a": plan}}, "site 'a' names 2 schemes by range of the timestep, and there are 1 ranges"),
        ({"sites": {"a": plan}, "range_edges": (5.0,)}, "and no rotation"),
        (
            {"sites": {"a": vq.SitePlan(scheme=None, by_range=(W8, W8))}, "range_edges": (5.0,)},
            "has the scheme None",
        ),
        ({"range_edges": (5.0, 5.0)}, "in rising order"),
        ({"range_edges": (torch.inf,)}, "in rising order"),
    ]:
        with pytest.raises(vq.RecipeError, match=message):
            vq.Recipe(scheme=W8, **asked)
