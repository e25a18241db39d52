"""Schemes, sites and options: what parses, what is refused, and that hook and node names agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viditq_fx.errors import OptionError, SchemeError
from viditq_fx.options import CompileOptions, split_options, unknown_option
from viditq_fx.scheme import QuantScheme, available_schemes, largest_int
from viditq_fx.site import Site, fqn_of_source, site_of_module


@pytest.mark.parametrize("name", available_schemes())
def test_scheme_round_trip(name):
    assert str(QuantScheme.parse(name)) == name
    assert QuantScheme.parse(name.upper() + " ") == QuantScheme.parse(QuantScheme.parse(name))


@given(st.text(max_size=8))
def test_any_other_text_is_a_clear_error(text):
    try:
        scheme = QuantScheme.parse(text)
    except SchemeError as error:
        assert "w8a8" in str(error)  # noqa: PT017 - few texts are schemes, and those must read back
    else:
        assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("value", [None, 8, ["w8a8"]])
def test_scheme_of_another_type(value):
    with pytest.raises(SchemeError, match="a scheme is a name"):
        QuantScheme.parse(value)


@pytest.mark.parametrize("name", ["w4a5", "w5a8", "w16a16", "w8a0", "w4a8-g32"])
def test_width_that_is_not_there_names_what_is(name):
    with pytest.raises(SchemeError, match=r"not available.*w8a8"):
        QuantScheme.parse(name)


def test_largest_int():
    assert [largest_int(b) for b in (2, 4, 7, 8)] == [1, 7, 63, 127]


@pytest.mark.parametrize(
    ("source", "fqn"),
    [
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self'].__dict__['_modules']['proj']", "proj"),
        ("L['self'].transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
        ("L['fn']._modules['0']", "0"),
        ("L['self']._orig_mod.head", "head"),
        ("L['self']", ""),
    ],
)
def test_source_names(source, fqn):
    assert fqn_of_source(source) == fqn


names = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}|[0-9]{1,2}", fullmatch=True), min_size=1, max_size=4)


@given(names)
def test_module_and_source_agree(steps):
    steps = [
        s for s in steps if s not in {"_orig_mod", "_modules", "_parameters", "_buffers", "__dict__"}
    ] or ["x"]
    source = "L['self']" + "".join(f"._modules['{step}']" for step in steps)
    assert site_of_module(".".join(steps)) == Site(fqn_of_source(source))


def test_ours_and_inductors_are_told_apart():
    ours, theirs = split_options(
        {"scheme": "w8a7", "keep": "head", "max_autotune": True, "epilogue_fusion": False}
    )
    assert (str(ours.scheme), ours.keep, ours.strict, ours.weights) == ("w8a7", ("head",), False, "keep")
    assert theirs == {"max_autotune": True, "epilogue_fusion": False}
    assert split_options(None) == (CompileOptions(), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 3}, "'keep' is a pattern"),
        ({"keep": ["a", ""]}, "'keep' is a pattern"),
        ({"strict": "yes"}, "'strict' is True or False"),
        ({"weights": "drop"}, "'weights' is one of"),
        ({"mode": 3}, "'mode' is the name"),
        ({"extra_passes": 3}, "'extra_passes' is a list"),
        ({"extra_templates": 3}, "'extra_templates' is a list"),
        ({3: 4}, "option names are strings"),
        ([("scheme", "w8a8")], "options must be a dict"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(OptionError, match=message):
        split_options(options)


def test_unknown_option_suggests_the_nearest():
    text = str(unknown_option("shceme", ["max_autotune"]))
    assert "'scheme'" in text
    assert "strict" in text
