"""The HTML page: whole, alone, and every site in it; files that cannot be written are told."""

import os
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("jinja2")

import viditq_fx as vq
from tests.small_models import tiny_dit, tiny_inputs
from viditq_fx.errors import ViditqError
from viditq_fx.inspection.breakdown import everything
from viditq_fx.inspection.page import render_page

VOID = {"meta", "input", "br", "img", "link", "hr"}


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        yield vq.explain(tiny_dit(2), *tiny_inputs(), options={"keep": ["blocks.1.down"]}, graphs=True)


class Balance(HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.links = [], 0, []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.rows += "data-outcome" in given
        self.links += [given[key] for key in ("src", "href") if key in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_alone(report):
    text = render_page(report)
    page = Balance()
    page.feed(text)
    assert not page.open
    assert page.rows == len(everything(report))
    assert not page.links
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text


def test_the_page_answers_and_lists_and_draws(report):
    text = render_page(report)
    for part in (
        "What is quantized",
        "What is not, and why",
        "What it saves",
        "blocks.1.down",
        "kept by pattern",
    ):
        assert part in text
    for site in report.sites:
        assert f"<code>{site.fqn}</code>" in text
    assert text.count("<svg") == 2 * text.count('class="graph"')
    assert '<span class="add">+linear_w8a8' in text


def test_names_are_escaped(report):
    site = report.sites[0]
    before, site.reason = site.reason, "<script>alert(1)</script>"
    try:
        assert "<script>alert" not in render_page(report)
    finally:
        site.reason = before


def test_files_are_whole_or_not_there(report, tmp_path, monkeypatch):
    path = report.to_html(str(tmp_path / "a.html"))
    assert path.read_text().endswith("</html>")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ViditqError, match=r"a\.html: No space left"):
        report.to_html(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize("name", ["none/a.html", "file/a.html", ".", "folder"])
def test_a_wrong_path_is_told(report, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ViditqError, match="cannot write"):
        report.to_html(tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(report, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ViditqError, match="Permission denied"):
        report.to_html(tmp_path / "a.html")


def test_without_jinja2_the_message_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ViditqError, match=r"viditq_fx\[cli\]"):
        report.to_html(tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
