"""The laboratory of recorded runs in chromium, operated by mouse and keyboard: its numbers against the records."""

import re

import numpy as np
import pytest

from eos_utils import catalogue, phases
from eos_utils.experiment import subscript
from eos_utils.sg_anomaly_panels import anomaly_points
from eos_utils.store import Store
from tests.browser import test_book as book

PAGE = "notebooks/laboratory_runs.html"
LIMIT = 1_500_000  # bytes of a page beyond fonts and maths


class Shown:
    """The page, read as a reader reads it."""

    def __init__(self, page):
        self.page, self.chart = page, page.locator(".lab-chart")

    def choose(self, title, many=None):
        self.page.get_by_label("recorded run").select_option(label=title)
        if many:
            self.page.get_by_role("slider", name="eigenvalues").fill(str(many))

    def press(self, *keys):
        self.chart.focus()
        for key in keys:
            self.chart.press(key)

    def view(self):
        slider = self.page.get_by_role("slider", name="step")
        return [int(slider.get_attribute(k)) for k in ("min", "max")] + [int(slider.input_value())]

    def read(self):
        """For each step that is told: what was recorded there."""
        rows = self.page.locator(".lab-values dl").evaluate_all(
            "all => all.map(dl => [...dl.children].map(d => [d.children[0].textContent, d.children[1].textContent]))"
        )
        found = {int(pairs[0][1].replace(",", "")): {k: float(v) for k, v in pairs[1:]} for pairs in rows}
        assert all(pairs[0][0] == "step" for pairs in rows) and len(found) == len(rows)
        return found

    def told(self):
        return self.page.locator(".lab-told").inner_text()

    def at(self, step):
        """Where a step is on the screen."""
        a, b, _ = self.view()
        box = self.chart.locator("svg").first.bounding_box()
        return box["x"] + 54 + (step - a) / (b - a) * (box["width"] - 64), box["y"] + 100


def five(value):
    """To five digits, from a 32-bit float."""
    return pytest.approx(float(value), rel=0.6e-4)


def compare(shown, run, many, two_over):
    """Everything the read-out says against the record; returns the step."""
    step, found = shown.view()[2], shown.read()
    wanted = {step: {"2/η": five(two_over), "loss": five(run["loss"].sel(step=step))}}
    gram = "observed" in run.dims
    for i in range(many):
        values = [run["sharpness"], run["second"]][i] if gram and i < 2 else None
        if values is None:
            values = run["gram_eigenvalue"][:, i] if gram else run["eigenvalue"][:, i]
        steps = run[values.dims[0]].values
        j = np.flatnonzero(steps <= step)[-1]
        wanted.setdefault(int(steps[j]), {})[f"λ{subscript(i + 1)}"] = five(values[j])
    if gram:
        wanted[step]["‖A‖²"] = five(run["norm_A2"].sel(observed=step))
        name = phases.NAMES[int(phases.labels_of(run)[step])]
        assert re.match(rf"Step {step:,}, (phase )?{name}(:|, an anomaly point:)", shown.told())
        assert ("anomaly point" in shown.told()) == bool(anomaly_points(run)[step])
    assert found == wanted
    return step


def test_what_is_shown_is_what_was_recorded(browser):
    watch = book.Watch(browser, "light", 1280)
    shown = Shown(watch.open(PAGE))
    page, records = shown.page, {}
    for name in ("fg_fig1_seed100", "sg_lin3_seed100", "sg_tanh4_seed100", "fg_fig3_after1_seed100"):
        records[name] = Store().load(catalogue.find(name).experiment.key)

    # As it opens; fewer eigenvalues; a step by the slider.
    first = records["fg_fig1_seed100"]
    assert compare(shown, first, 6, 30) == 0 and shown.view() == [0, int(first["step"][-1]), 0]
    page.get_by_role("slider", name="eigenvalues").fill("3")
    page.get_by_role("slider", name="step").fill("2107")
    assert compare(shown, first, 3, 30) == 2107 and set(shown.read()) == {2107, 2100}
    assert page.locator(".lab-edge").count() == 1
    assert page.locator(".lab-edge").evaluate("e => getComputedStyle(e).strokeDasharray") == "6px, 4px"

    # Another run, whose phases and anomaly points are drawn; the mouse; a stretch dragged over.
    lin = records["sg_lin3_seed100"]
    shown.choose("linear, 2 hidden layers of 100, 2/η = 286 (10 eigenvalues)", many=10)
    assert page.locator(".lab-eig .lab-phase").count() == len(phases.segments(phases.labels_of(lin)))
    assert page.locator(".lab-anomaly").get_attribute("d").count("M") == anomaly_points(lin).sum()
    page.mouse.move(*shown.at(700))
    assert abs(compare(shown, lin, 10, 2 / 0.007) - 700) <= 3
    crest = int(np.argmax(lin["loss"].values[10:])) + 10
    page.mouse.move(*shown.at(crest - 40))
    page.mouse.down()
    page.mouse.move(*shown.at(crest + 40), steps=3)
    page.mouse.up()
    a, b, _ = shown.view()
    assert abs(a - (crest - 40)) <= 3 and abs(b - (crest + 40)) <= 3
    page.mouse.move(*shown.at(crest))
    assert compare(shown, lin, 10, 2 / 0.007) == crest
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function(
        f"() => document.querySelector('[name=cursor]').max - document.querySelector('[name=cursor]').min < {b - a}"
    )
    page.get_by_label("phases shaded").uncheck()
    page.get_by_label("anomaly points").uncheck()
    assert page.locator(".lab-phase, .lab-anomaly").count() == 0

    # By the keyboard alone.
    tanh = records["sg_tanh4_seed100"]
    shown.choose("tanh, 3 hidden layers of 100, 2/η = 200 (10 eigenvalues)")
    shown.press("End", "+", "+", "+", "+", "Shift+ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight")
    a, b, _ = shown.view()
    assert b == 1000 and 55 <= b - a <= 65 and compare(shown, tanh, 6, 200) == 989
    shown.press("PageUp", "Home")
    assert compare(shown, tanh, 6, 200) == shown.view()[0] < a
    shown.press("Escape")
    assert shown.view()[:2] == [0, 1000]

    # A decay of the step size: the base run before it, the fork from it on.
    shown.choose("ReLU, 1 hidden layer of 128, 2/η = 30, 120 from step 2,100 (2 eigenvalues)")
    page.get_by_role("slider", name="step").fill("2099")
    assert compare(shown, first, 2, 30) == 2099
    page.get_by_role("slider", name="step").fill("2123")
    assert compare(shown, records["fg_fig3_after1_seed100"], 2, 120) == 2123
    assert not page.get_by_label("phases shaded").is_visible()

    # On paper there is the picture.
    page.emulate_media(media="print")
    assert not shown.chart.is_visible() and page.locator(".eos-lab-picture img.only-light").is_visible()
    assert not watch.problems, watch.problems
    watch.context.close()


def test_without_scripts_there_is_the_picture(browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book.HTML / PAGE).as_uri())
    assert page.locator(".eos-lab-picture img").first.is_visible()
    context.close()


def test_the_page_is_light():
    own = [book.HTML / PAGE, *(book.HTML / "_static").glob("eos*")]
    assert sum(path.stat().st_size for path in own) < LIMIT
