"""Expected times are shown where the cost model knows them: in the tables, the JSON, the page and a sentence."""

import json

import pytest

from viditq_fx.inspection.collect import ExplainedSite, ExplainReport, _merge
from viditq_fx.inspection.render import EXPECTED, site_table


def site(fqn, full=None, quantized=None, done=None, **rest):
    times = {"expected_us": quantized, "expected_full_us": full}
    shape = {"rows": "4608", "depth": 3072, "width": 3072, "role": "attn.out"}
    if done:
        rest |= {"planned": done, "done": done, "bytes_full": 200, "resident_packed": 100}
    return ExplainedSite(fqn=fqn, weight=fqn, **shape, **times, **rest)


def report(*sites):
    return ExplainReport(
        model="Flux", schemes=("w8a8",), device="cuda", graphs=1, graph_runs=1, sites=list(sites)
    )


KNOWN = report(
    site("a", full=2000.0, quantized=1500.0, done="w8a8"),
    site("b", full=500.0, quantized=600.0, reason="bf16 is as fast or faster"),
    site("c", full=100.0, reason="conditioning"),
)


def test_the_total_is_of_what_runs():
    """b could be quantized and is not: its time is that of full precision."""
    assert KNOWN.expected_times() == {"us": 1500.0 + 500.0 + 100.0, "full_us": 2600.0}
    assert "Expected time of the linears of a call: 2.1 ms instead of 2.6 ms, an estimate" in str(KNOWN)


def test_tables_json_and_page_show_both_times():
    table = site_table(KNOWN)
    at = table.columns.index(EXPECTED)
    assert [row[at] for row in table.rows] == ["1500.0 (2000.0)", "600.0 (500.0)", "(100.0)"]
    data = json.loads(KNOWN.to_json())
    assert data["expected"] == KNOWN.expected_times()
    assert [(s["expected_us"], s["expected_full_us"]) for s in data["sites"]][1:] == [
        (600.0, 500.0),
        (None, 100.0),
    ]


@pytest.mark.parametrize("known", [True, False])
def test_the_page_and_the_terminal_have_the_column_where_it_is_known(known):
    pytest.importorskip("jinja2")
    pytest.importorskip("rich")
    from viditq_fx.cli.tables import explain_table
    from viditq_fx.inspection.page import render_page

    shown = KNOWN if known else report(site("a", done="w8a8"))
    assert (EXPECTED in render_page(shown)) is known
    assert ("1500.0 (2000.0)" in render_page(shown)) is known
    assert (EXPECTED in [column.header for column in explain_table(shown).columns]) is known
    assert (EXPECTED in site_table(shown).columns) is known
    assert len({len(row) for row in site_table(shown).rows} | {len(site_table(shown).columns)}) == 1


def test_one_unknown_time_leaves_the_total_out():
    mixed = report(*KNOWN.sites, site("d", done="w8a8"))
    assert mixed.expected_times() is None
    assert json.loads(mixed.to_json())["expected"] is None
    assert "Expected time" not in str(mixed)


def test_calls_of_one_site_add_up():
    twice = [site("a", full=20.0, quantized=15.0, done="w8a8") for _ in range(2)]
    (merged,) = _merge(twice)
    assert (merged.calls, merged.expected_us, merged.expected_full_us) == (2, 30.0, 40.0)
    (merged,) = _merge([site("a"), site("a", full=1.0)])
    assert merged.expected_full_us is None
