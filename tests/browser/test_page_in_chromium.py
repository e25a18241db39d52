"""The explain page in a real browser: counts, search, filters, collapsing, pictures, dark, nothing fetched."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("jinja2")

import viditq_fx as vq
from tests.models.tiny_dits import TINY_DITS
from viditq_fx.inspection.blocks import choose_block, find_blocks
from viditq_fx.inspection.breakdown import block_of, everything
from viditq_fx.inspection.render import why

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LAYERS = 2


@pytest.fixture(scope="module", params=["flux_dev", "latte"])
def written(request, tmp_path_factory):
    """(name, report, its page)."""
    dit = TINY_DITS[request.param]
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
        report = vq.explain(dit.build(LAYERS), graphs=True, **dit.make_inputs())
    path = report.to_html(tmp_path_factory.mktemp("page") / "page.html")
    return request.param, report, path


@pytest.fixture
def opened(written, driver):
    """(name, report, driver with the page freshly open)."""
    name, report, path = written
    driver.get(path.as_uri())
    return name, report, driver


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def found(sites, *words):
    """Sites that a search for these words shows: it looks at paths and at reasons."""
    return [s for s in sites if all(word in f"{s.fqn} {why(s)}" for word in words)]


def visible_rows(driver):
    return [row for row in find(driver, "#sites tbody tr") if row.is_displayed()]


def status(driver):
    return find(driver, "#shown")[0].text


def choose(driver, name, value):
    script = "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
    driver.execute_script(script + "field.dispatchEvent(new Event('input'))", name, value)


def search(driver, text):
    box = find(driver, "#search")[0]
    box.clear()
    box.send_keys(text)
    if not text:
        choose(driver, "search", "")


def test_the_answers_are_at_the_top(opened):
    _, report, driver = opened
    sections = [section.text for section in find(driver, ".answers section")]
    assert [text.splitlines()[0] for text in sections[:3]] == [
        "What is quantized",
        "What is not, and why",
        "What it saves",
    ]
    assert f"{report.count('quantized')} of {len(report.sites)} linears" in sections[0]
    assert "final projection" in sections[1]
    assert "instead of" in sections[2]


def test_search_and_filters_count_what_they_show(opened):
    _, report, driver = opened
    sites = everything(report)
    find(driver, "#expand")[0].click()
    assert status(driver) == f"{len(sites)} of {len(sites)} sites"
    assert len(visible_rows(driver)) == len(sites)

    search(driver, "blocks.1 TO_Q")
    wanted = found(sites, "blocks.1", "to_q")
    assert 1 < len(wanted) < len(sites)
    assert status(driver) == f"{len(wanted)} of {len(sites)} sites"
    assert {row.find_element("css selector", "code").text for row in visible_rows(driver)} == {
        site.fqn for site in wanted
    }

    search(driver, "")
    choose(driver, "role", "ffn.down")
    assert len(visible_rows(driver)) == sum(site.role == "ffn.down" for site in sites)
    choose(driver, "role", "")
    choose(driver, "outcome", "kept")
    assert len(visible_rows(driver)) == sum(site.outcome == "kept" for site in sites)

    search(driver, "no such thing")
    assert status(driver) == f"0 of {len(sites)} sites"
    assert find(driver, "#none")[0].is_displayed()
    search(driver, "")
    choose(driver, "outcome", "")
    assert len(visible_rows(driver)) == len(sites)


def test_blocks_collapse(opened):
    _, report, driver = opened
    sites = everything(report)
    find(driver, "#expand")[0].click()
    summary = find(driver, '#sites .block[data-block="transformer_blocks.0"] > summary')[0]
    inside = sum(block_of(site.fqn) == "transformer_blocks.0" for site in sites)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
    summary.click()
    assert len(visible_rows(driver)) == len(sites) - inside
    find(driver, "#collapse")[0].click()
    assert not visible_rows(driver)
    search(driver, "to_k")  # a search opens what it finds
    assert len(visible_rows(driver)) == len(found(sites, "to_k"))
    search(driver, "")


def test_pictures_and_diffs_are_there(opened):
    _, _, driver = opened
    shown = [svg for svg in find(driver, ".picture svg") if svg.is_displayed()]
    assert len(shown) == 1
    drawn = shown[0].find_elements("css selector", "g.quantized rect")
    assert len(drawn) > 4
    assert all(box.size["width"] > 20 for box in drawn[1:])  # the first is the legend's
    assert find(driver, ".diff pre .add")


CLIPPED = """
return [...arguments[0].querySelectorAll(".column g[class]:not(.badge)")].flatMap((box) => {
  const rect = box.querySelector("rect").getBBox();
  return [...box.querySelectorAll(":scope > text")].filter((text) => {
    const inner = text.getBBox();
    const right = inner.x + inner.width, bottom = inner.y + inner.height;
    return inner.x < rect.x || right > rect.x + rect.width || bottom > rect.y + rect.height + 1;
  }).map((text) => text.textContent);
});
"""


def test_the_typical_block_is_open_and_its_picture_fits(opened):
    """At 1400 pixels nothing scrolls sideways, a block is seen at a glance, and every label is inside its box."""
    _, report, driver = opened
    (shown,) = [item for item in find(driver, ".graph") if item.get_attribute("open")]
    blocks = find_blocks(report.snapshots)
    assert shown.get_attribute("data-block") == choose_block(blocks).name
    assert len(choose_block(blocks).alike) == max(len(block.alike) for block in blocks)
    (picture,) = [item for item in find(driver, ".picture") if item.is_displayed()]
    wide = driver.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", picture)
    assert wide <= 0
    assert picture.size["height"] < 1000
    assert driver.execute_script(CLIPPED, picture) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark(opened, screenshots, theme):
    name, _, driver = opened
    media = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"}[theme]
    height = driver.execute_script("return document.documentElement.scrollHeight")
    driver.set_window_size(1400, min(height + 100, 8000))
    assert driver.save_screenshot(str(screenshots / f"{name}-{theme}.png"))
    driver.set_window_size(1400, 1000)


def test_nothing_is_fetched_and_nothing_fails(opened):
    _, _, driver = opened
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_narrow_window_does_not_scroll_sideways(opened):
    _, _, driver = opened
    driver.set_window_size(500, 900)
    wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    driver.set_window_size(1400, 1000)
    assert wide <= 0
