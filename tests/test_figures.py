"""Figures to take away, and colours that the colour-blind can tell apart."""

import base64
import csv
import io
import itertools
import json
import pathlib
import re
import xml.etree.ElementTree as ET

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from eos_utils import downloads, figures

STEPS = np.arange(200)
ALT = "Two panels over the step: above a rising line that meets the dashed edge, below a falling loss."


def two_panels():
    rising = figures.Curve(STEPS, np.sqrt(STEPS), label="λ₁")
    falling = figures.Curve(STEPS[1:], 1 / STEPS[1:], kind="points")
    above = figures.Panel([rising], "sharpness", level=12.5, title="at η = 2/12.5", spans=[(20, 40, "III")])
    return figures.panels(above, figures.Panel([falling], "loss", "step", log="y", marks=[50]))


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_holds_what_the_figure_draws():
    found = rows(downloads.as_csv(two_panels()))
    assert list(found[0]) == list(downloads.COLUMNS)
    line = [(float(r["x"]), float(r["y"])) for r in found if r["series"] == "λ₁"]
    assert np.allclose(line, np.stack([STEPS, np.sqrt(STEPS)], 1), rtol=1e-6)
    below = [(float(r["x"]), float(r["y"])) for r in found if r["y axis"] == "loss" and r["x"] and r["y"]]
    assert np.allclose(below, np.stack([STEPS[1:], 1 / STEPS[1:]], 1), rtol=1e-6)
    assert [(r["x"], r["y"]) for r in found if r["series"] == "2/η"] == [("", "12.5")]
    upright = [r for r in found if r["x"] and not r["y"]]
    assert [(r["panel"], r["series"], float(r["x"])) for r in upright] == [
        ("1 at η = 2/12.5", "III (stretch)", 20.0),
        ("1 at η = 2/12.5", "III (stretch)", 40.0),
        ("2", "unnamed 2", 50.0),
    ]
    plt.close("all")


def test_a_band_has_both_borders_and_points_that_are_not_finite_are_left_out():
    figure, axis = plt.subplots()
    axis.fill_between(STEPS, STEPS / 2, STEPS, label="bounds")
    axis.plot(STEPS[:3], [1, np.nan, np.inf], gid="λ₇")
    found = rows(downloads.as_csv(figure))
    band = np.array([[float(r[c]) for c in ("x", "y", "y to")] for r in found if r["series"] == "bounds (band)"])
    assert np.allclose(band, np.stack([STEPS, STEPS / 2, STEPS], 1))
    assert [r["y"] for r in found if r["series"] == "λ₇"] == ["1"]
    plt.close(figure)


def test_what_the_csv_would_lack_is_an_error():
    figure, axis = plt.subplots()
    axis.scatter([1], [2])
    with pytest.raises(TypeError, match="PathCollection: a figure's CSV would lack it"):
        downloads.as_csv(figure)
    plt.close(figure)


def test_panels_with_the_same_names_share_one_legend():
    def drawn(*names):
        return figures.panels(*(figures.Panel([figures.Curve([0, 1], [0, 1], n)], "y") for n in names), columns=2)

    same, other = drawn("a", "a", "a"), drawn("a", "b", "a")
    assert [t.get_text() for t in same.legends[0].get_texts()] == ["a"] and not any(a.get_legend() for a in same.axes)
    assert not other.legends and all(a.get_legend() for a in other.axes[:3])
    plt.close("all")


def executed(metadata):
    bundle = figures.show(two_panels, alt=ALT)._repr_mimebundle_()
    output = {"output_type": "execute_result", "data": bundle, "metadata": {}}
    return bundle, {"cells": [{"cell_type": "code", "metadata": metadata, "outputs": [output]}]}


def test_staging_writes_the_files_and_the_page_names_them(tmp_path):
    bundle, notebook = executed({"mystnb": {"figure": {"name": "fg-figure"}}})
    inline = re.findall(r"base64,([^\"]+)", bundle["text/html"])
    downloads.place(notebook, "page", tmp_path)
    data = notebook["cells"][0]["outputs"][0]["data"]
    assert set(data) == {"text/html"} and "base64" not in data["text/html"]
    named = re.findall(r'(?:src|href)="([^"]+)"', data["text/html"])
    suffixes = ["-light.png", "-dark.png", ".svg", ".csv"]
    assert named == [f"../_static/figures/page/fg-figure{suffix}" for suffix in suffixes]
    folder = tmp_path / "figures" / "page"
    assert {p.name for p in folder.iterdir()} == {name.rpartition("/")[2] for name in named}
    for theme, text in zip(("light", "dark"), inline, strict=True):
        assert (folder / f"fg-figure-{theme}.png").read_bytes() == base64.b64decode(text)
    assert ET.parse(folder / "fg-figure.svg").getroot().tag.endswith("svg")
    assert (folder / "fg-figure.csv").read_text("utf-8") == downloads.as_csv(two_panels())
    plt.close("all")


def test_a_figure_without_a_name_has_its_cell_s_number_and_svg_no_chance(tmp_path):
    _, notebook = executed({})
    again, _ = executed({})
    assert notebook["cells"][0]["outputs"][0]["data"] == again  # pictures, SVG and CSV to the byte
    downloads.place(json.loads(json.dumps(notebook)), "page", tmp_path)
    assert (tmp_path / "figures" / "page" / "cell-1.svg").is_file()


# Severe forms of the three kinds, in linear RGB: Machado, Oliveira and Fernandes (2009), IEEE TVCG 15(6), table 1.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
PAGE = {"light": "#ffffff", "dark": "#14181e"}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, deficiency, alpha=1.0, page="#ffffff"):
    """CIELAB (D65) of a colour, blended with the page, as somebody with the deficiency sees it."""
    blended = alpha * np.array(to_rgb(colour)) + (1 - alpha) * np.array(to_rgb(page))
    linear = np.where(blended <= 0.04045, blended / 12.92, ((blended + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / TO_XYZ.sum(1), 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", figures.THEMES)
def test_curves_are_told_apart_and_from_the_page(theme, deficiency):
    with matplotlib.rc_context(figures.style(theme)):
        colours = [lab(c, deficiency) for c in figures.shades(5)]
        for one, other in itertools.pairwise(colours):
            assert np.linalg.norm(one - other) > 8  # about 2.3 is just noticeable
            assert (one[0] < other[0]) == (theme == "light")  # and in the same order without any colour
        page = lab(PAGE[theme], deficiency)
        for colour in [*colours, lab(figures.muted(), deficiency)]:
            assert abs(colour[0] - page[0]) > 20


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", figures.THEMES)
def test_neighbouring_phases_are_told_apart(theme, deficiency):
    seen = {name: lab(c[0], deficiency, c[1], PAGE[theme]) for name, c in figures.SPANS.items()}
    meet = [*itertools.pairwise("I II III IV I".split()), *((name, "hovering") for name in ("I", "II", "III", "IV"))]
    distance = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in meet}
    assert min(distance.values()) > 5, distance  # about 2.3 is just noticeable
    page = lab(PAGE[theme], deficiency)
    assert min(np.linalg.norm(colour - page) for colour in seen.values()) > 6


def test_the_laboratory_has_the_same_shades_of_the_phases():
    css = (pathlib.Path(__file__).resolve().parents[1] / "book" / "_static" / "eos.css").read_text("utf-8")
    for name, (colour, opacity) in figures.SPANS.items():
        assert re.search(rf"\.lab-in-{name} {{\s*--phase: {colour.lower()};", css), name
        if opacity != 0.3:
            assert re.search(rf"\.lab-in-{name} {{\s*opacity: {opacity};", css), name
