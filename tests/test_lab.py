"""What the page of the laboratory holds."""

import json
import re

import numpy as np
import pytest

from eos_utils import fg_blocks as blocks
from eos_utils import lab

GIVEN = dict(ratio=0.8, q=1.1, width=40, scale=1e-3, seed=200, starts=2, steps=60)


def test_the_page_holds_the_run_of_the_model():
    given = lab.setting(**GIVEN)
    run, whole = lab.path(given), blocks.train("1, 1, -0.8, -0.8", 1.1, 40, 1e-3, 60, 200)
    assert np.allclose(run.w[0], whole.w[0], rtol=1e-5) and run.eta == pytest.approx(whole.eta)
    assert np.allclose(blocks.tops(run, 1), blocks.tops(whole, 1), rtol=1e-2, atol=1e-6)
    assert not np.allclose(lab.path(given, 1).w[0], run.w[0])
    tops, loss = lab.panels(run, 40)
    assert tops.curves[0].y[-1] == pytest.approx(float(blocks.tops(run, 1)[40, 0] * run.eta[0] / 2))
    assert loss.curves[0].y[40] == pytest.approx(float((run.error[40] ** 2).sum() * 4 / 2))


def test_fewer_neurons_are_the_first_ones():
    few = lab.path(lab.setting(**{**GIVEN, "width": 7}))
    assert few.w.shape[2] == 7 and np.array_equal(few.w[0], lab.path(lab.setting(**GIVEN)).w[0][:, :7])


def test_the_page_is_plain_text_and_small():
    html = lab.page(lab.setting(**{**GIVEN, "starts": 6})).data
    held = re.search(r"<script type=\"application/json\">(.*)</script>", html, re.S)[1]
    assert json.loads(held)["starts"][0]["w"] and len(html) < 30_000 and "<noscript>" in html


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"ratio": 1.1}, {"width": 0}, {"width": 41}, {"starts": 0}])
def test_refusals(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        lab.setting(**{**GIVEN, **wrong})
