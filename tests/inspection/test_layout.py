"""The layout: arrows go down, boxes do not overlap, the same input gives the same picture, with and without dot."""

import random
import subprocess
from itertools import pairwise

import pytest

from viditq_fx.inspection import layout as layout_module
from viditq_fx.inspection.layout import lay_out, lay_out_in_layers, layers_of


def a_graph(seed, nodes=40):
    """A random graph without cycles, with long edges and boxes of many sizes."""
    draw = random.Random(seed)
    sizes = {f"n{i}": (draw.uniform(20, 200), draw.uniform(20, 50)) for i in range(nodes)}
    edges = {(f"n{draw.randrange(i)}", f"n{i}") for i in range(1, nodes) for _ in range(draw.randint(0, 3))}
    return sizes, sorted(edges)


def check(layout, sizes, edges):
    assert set(layout.centres) == set(sizes)
    for name, (x, y) in layout.centres.items():
        width, height = sizes[name]
        assert -0.6 <= x - width / 2
        assert x + width / 2 <= layout.width + 0.6
        assert -0.6 <= y - height / 2
        assert y + height / 2 <= layout.height + 0.6
    names = list(sizes)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            (x0, y0), (x1, y1) = layout.centres[one], layout.centres[other]
            apart_x = abs(x0 - x1) >= (sizes[one][0] + sizes[other][0]) / 2 - 0.6
            apart_y = abs(y0 - y1) >= (sizes[one][1] + sizes[other][1]) / 2 - 0.6
            assert apart_x or apart_y, (one, other)
    for source, target in edges:
        assert layout.centres[source][1] < layout.centres[target][1]
        assert len(layout.curves[source, target]) % 3 == 1


@pytest.mark.parametrize("seed", range(4))
def test_our_own_layout(seed):
    sizes, edges = a_graph(seed)
    layout = lay_out_in_layers(sizes, edges)
    check(layout, sizes, edges)
    assert layout == lay_out_in_layers(sizes, edges)


def test_what_hangs_on_inputs_alone_stands_near_its_user():
    """text -> kv is ready at once, and is drawn where the fifth box of the main path reads it."""
    path = [f"a{i}" for i in range(6)]
    edges = [*pairwise(path), ("text", "kv"), ("kv", "a5"), ("a1", "side"), ("side", "a5")]
    layer = layers_of([*path, "text", "kv", "side"], edges)
    assert [layer[name] for name in path] == list(range(6))
    assert (layer["text"], layer["kv"]) == (3, 4)
    assert layer["side"] == 2  # it needs the main path, and stays with it


def test_one_box_and_none():
    assert lay_out_in_layers({"a": (40.0, 20.0)}, []).centres == {"a": (20.0, 10.0)}
    assert lay_out_in_layers({}, []).centres == {}


PLAIN = """graph 1 2 3
node n0 1 2.5 0.5 0.5 "" solid box black lightgrey
node n1 1 0.5 0.5 0.5 "" solid box black lightgrey
edge n0 n1 4 1 2.2 1 1.8 1 1.2 1 0.8 solid black
stop
"""


def test_dot_is_used_when_it_is_there(monkeypatch):
    monkeypatch.setattr(layout_module.shutil, "which", lambda name: f"/somewhere/{name}")

    def run(command, **settings):
        assert command == ["/somewhere/dot", "-Tplain"]
        assert "n0 -> n1" in settings["input"]
        return subprocess.CompletedProcess(command, 0, stdout=PLAIN)

    monkeypatch.setattr(layout_module.subprocess, "run", run)
    sizes, edges = {"a": (36.0, 36.0), "b": (36.0, 36.0)}, [("a", "b")]
    layout = lay_out(sizes, edges)
    check(layout, sizes, edges)
    assert (layout.width, layout.height) == (144, 216)


def test_a_dot_that_fails_is_replaced(monkeypatch):
    monkeypatch.setattr(layout_module.shutil, "which", lambda name: "/nowhere/dot")
    sizes, edges = a_graph(0)
    assert lay_out(sizes, edges) == lay_out_in_layers(sizes, edges)
