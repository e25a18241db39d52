"""The sections on errors and steps in a real browser: sorted, filtered, inside their pictures, nothing sideways."""

import pytest
import torch

pytest.importorskip("jinja2")

import viditq_fx as vq
from tests.made_findings import loud_channel, made_findings
from viditq_fx.inspection.errors import error_report
from viditq_fx.inspection.steps import StepHistory
from viditq_fx.switching import StepRecord, SwitchRule

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SITES = [f"blocks.{index}.attn.to_q" for index in range(12)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of twelve inputs, ever louder, and two generations of ten steps."""
    inputs = {(site,): (torch.ones(2, 64), loud_channel(64, 1, 1.0 + i)) for i, site in enumerate(SITES)}
    report = vq.ExplainReport(model="Made", schemes=("dvd-w4a8",), device="cpu", graphs=1, graph_runs=1)
    report.errors = error_report(made_findings(inputs, dict.fromkeys(SITES, torch.randn(6, 64))), None)
    records = [
        StepRecord(generation=g, step=i, timestep=1000.0 - i, bits=b, change=0.02, since_high=0.02 * i)
        for g in range(2)
        for i, b in enumerate(["high", "low"] * 5)
    ]
    rule = SwitchRule(delta=0.05)
    report.steps = [StepHistory(rule=rule, low_bits=4, high_bits=8, records=tuple(records))]
    return report.to_html(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(page, driver):
    """The driver with the page freshly open."""
    driver.get(page.as_uri())
    return driver


def shown(driver):
    rows = driver.find_elements("css selector", "#errors-table tbody tr")
    return [row.find_element("css selector", "code").text for row in rows if row.is_displayed()]


def test_a_click_on_a_title_sorts_and_another_turns_it(opened):
    titles = opened.find_elements("css selector", "#errors-table th button")
    (channel,) = [title for title in titles if title.text == "channel"]
    channel.click()
    assert shown(opened) == SITES[::-1]
    assert channel.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    channel.click()
    assert shown(opened) == SITES
    titles[0].click()  # paths by their numbers: blocks.2 before blocks.10
    assert shown(opened) == SITES


def test_a_filter_counts_what_it_shows(opened):
    opened.find_element("css selector", "#errors-search").send_keys("blocks.1")
    assert sorted(shown(opened)) == sorted(SITES[i] for i in (1, 10, 11))
    assert opened.find_element("css selector", "#errors-shown").text == "3 of 12 sites"


OUTSIDE = """
return [...document.querySelectorAll(".vq-chart")].flatMap((svg) => {
  const whole = svg.viewBox.baseVal;
  return [...svg.querySelectorAll("text, rect, circle")].filter((part) => {
    const box = part.getBBox();
    return box.x < 0 || box.y < 0 || box.x + box.width > whole.width || box.y + box.height > whole.height;
  }).map((part) => part.textContent);
});
"""
OVERLAP = """
const texts = [...document.querySelectorAll("#errors .vq-chart text")].map((t) => [t.textContent, t.getBBox()]);
return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([two, b]) =>
  a.x + a.width > b.x && b.x + b.width > a.x && a.y + a.height > b.y + 2 && b.y + b.height > a.y + 2
).map(([two, b]) => [one, two]));
"""


def test_pictures_hold_what_they_draw_and_no_label_hides_another(opened):
    assert len(opened.find_elements("css selector", ".vq-chart")) == 2
    assert opened.execute_script(OUTSIDE) == []
    assert opened.execute_script(OVERLAP) == []
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_looked_at_in_both_themes(opened, screenshots, theme):
    media = [{"name": "prefers-color-scheme", "value": theme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    bars = opened.find_elements("css selector", "#errors .vq-chart rect.bar")
    fill = opened.execute_script("return getComputedStyle(arguments[0]).fill", bars[0])
    assert fill == {"light": "rgb(47, 98, 181)", "dark": "rgb(127, 168, 234)"}[theme]
    opened.set_window_size(1400, 2200)
    assert opened.save_screenshot(str(screenshots / f"errors-{theme}.png"))
    opened.set_window_size(1400, 1000)


def test_a_narrow_window_does_not_scroll_sideways(opened):
    opened.set_window_size(500, 900)
    wide = opened.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    opened.set_window_size(1400, 1000)
    assert wide <= 0
