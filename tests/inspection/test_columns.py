"""Pictures in columns: nothing is lost, no arrow crosses, what crosses a cut bears one number at both ends."""

import random

import pytest

from viditq_fx.inspection.columns import PAGE_WIDTH, in_columns
from viditq_fx.inspection.drawing import to_svg
from viditq_fx.inspection.flow_graph import FlowGraph, FlowNode, _folded


def box(key, kind="quantized", label="op"):
    return FlowNode(key=key, kind=kind, lines=(label, "f32 2x64"), tooltip=key, part=key.rstrip("0123456789"))


def graph_of(nodes, edges):
    return FlowGraph(title="a block", nodes=tuple(nodes), edges=tuple(edges))


def chain(length, residual=False):
    """in -> a0 -> a1 -> ...; with residual edges from each fourth box to the one four below."""
    nodes = [box("in", "port"), *(box(f"a{i}") for i in range(length))]
    edges = [("in", "a0"), *((f"a{i}", f"a{i + 1}") for i in range(length - 1))]
    if residual:
        edges += [(f"a{i}", f"a{i + 4}") for i in range(0, length - 4, 4)]
    return graph_of(nodes, edges)


def scattered(seed, count=30):
    draw = random.Random(seed)
    nodes = [box(f"in{i}", "port") for i in range(3)] + [box(f"a{i}") for i in range(count)]
    edges = {(draw.choice([n.key for n in nodes[: 3 + i]]), f"a{i}") for i in range(count) for _ in range(2)}
    return graph_of(nodes, sorted(edges))


def sizes_of(graph, width=150.0, height=42.0):
    return {node.key: (width, height) for node in graph.nodes}


def plain(key):
    """The box that a box of a column is, or stands for."""
    return key.split(":", 2)[2] if key.startswith(("link:", "port:")) else key


def check(graph, columns):
    keys = [node.key for column in columns for node in column.nodes]
    assert len(keys) == len(set(keys))
    drawn = [(plain(a), plain(b)) for column in columns for a, b in column.edges]
    assert sorted(drawn) == sorted(graph.edges)
    for column in columns:
        inside = {node.key for node in column.nodes}
        assert {end for edge in column.edges for end in edge} <= inside
    computed = [key for key in keys if not key.startswith(("link:", "port:"))]
    assert {plain(key) for key in keys} == {node.key for node in graph.nodes}
    where = {
        key: i for i, column in enumerate(columns) for key in (n.key for n in column.nodes) if key in computed
    }
    numbers = {}
    for index, column in enumerate(columns):
        for key, number in column.numbers.items():
            assert numbers.setdefault(plain(key), number) == number
            assert where[plain(key)] <= index
        links = [key for key in (n.key for n in column.nodes) if key.startswith("link:")]
        assert all(key in column.numbers and where[plain(key)] < index for key in links)
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("residual", [False, True])
def test_a_long_chain_is_cut_where_little_crosses(residual):
    graph = chain(24, residual)
    columns = in_columns(graph, sizes_of(graph))
    check(graph, columns)
    assert len(columns) > 1
    tallest = max(len(column.nodes) for column in columns)
    assert tallest <= 14
    assert max(len(column.numbers) for column in columns) <= 2 + 2 * residual


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_whatever_the_graph(seed):
    graph = scattered(seed)
    check(graph, in_columns(graph, sizes_of(graph)))


def test_what_is_short_or_wide_stays_one_column():
    short = chain(4)
    assert len(in_columns(short, sizes_of(short))) == 1
    wide = graph_of([box(f"a{i}") for i in range(9)], [])
    assert len(in_columns(wide, sizes_of(wide, width=PAGE_WIDTH / 3))) == 1
    assert in_columns(graph_of([], []), {}) == []


def test_an_input_is_repeated_and_an_output_stands_with_its_box():
    base = chain(24)
    nodes = [*base.nodes, box("out:a11", "port")]
    graph = graph_of(nodes, [*base.edges, ("in", "a23"), ("a11", "out:a11")])
    columns = in_columns(graph, sizes_of(graph))
    check(graph, columns)
    keys = [{plain(node.key) for node in column.nodes} for column in columns]
    assert sum("in" in inside for inside in keys) == 2
    assert not any("in" in column.numbers for column in columns)
    (home,) = [inside for inside in keys if "out:a11" in inside]
    assert "a11" in home


def test_a_picture_in_columns_says_so():
    text = to_svg(chain(24, residual=True))
    assert "same number, same value" in text
    assert text.count('class="badge"') >= 3  # the legend's, and one at both ends
    assert text.count('class="column"') == 1 + text.count('class="rule"')
    assert "same number" not in to_svg(chain(4))


def test_labels_are_whole():
    long = "time_text_embed.timestep_embedder.linear_1"
    node = FlowNode(
        key="a", kind="kept", lines=("linear", f"{long} · cond.of.a.long.role", "f32 2"), tooltip=""
    )
    text = to_svg(graph_of([node], []))
    assert f">{long}</text>" in text
    assert ">· cond.of.a.long.role</text>" in text


def test_ops_that_lead_to_one_op_share_its_box():
    """q -> mul -> add, mul -> neg -> add: one box; what two boxes read, or a site, stays alone."""
    names = {"q": "linear", "mul": "mul", "neg": "neg", "add": "add", "both": "cat", "x": "exp", "y": "sin"}
    nodes = [box(k, "quantized" if k == "q" else "other", label) for k, label in names.items()]
    nodes.append(box("out:x", "port"))
    edges = [("q", "mul"), ("mul", "neg"), ("mul", "add"), ("neg", "add"), ("add", "both")]
    edges += [("both", "x"), ("both", "y"), ("x", "out:x"), ("q", "y")]
    folded = _folded(graph_of(nodes, edges))
    assert {node.key: node.lines[0] for node in folded.nodes} == {
        "q": "linear",
        "both": "mul, neg, add, cat",
        "x": "exp",
        "y": "sin",
        "out:x": "op",
    }
    assert set(folded.edges) == {("q", "both"), ("both", "x"), ("both", "y"), ("x", "out:x"), ("q", "y")}
