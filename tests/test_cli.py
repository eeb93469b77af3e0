"""The command line, page helpers and figures."""

import json
import pathlib

import numpy as np
import pytest

from eos_utils import cli, figures, page, run
from eos_utils.catalogue import catalogue, find
from eos_utils.experiment import Experiment, Measure

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def trajectory():
    """A small live run."""
    e = Experiment(dataset="digits", n=100, width=8, eta="2/10", steps=120, seed=1)
    result, _ = run.compute(e, Measure(k=5, stride=3), progress=False)
    result.attrs.update(source="live", key=e.key)
    return result


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("EOS_CACHE_DIR", str(tmp_path / "cache"))


def test_list_names_every_notebook_parameter_and_run(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "fg_fig1_top_eigenvalues" in out and "rational" in out and "step size" in out
    assert all(name in out for name in catalogue())


def test_status_says_which_state_each_run_is_in_and_why(capsys):
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in catalogue().values():
        line = next(line for line in lines if f" {entry.name} " in line)
        assert line.split()[0] == entry.status().state and entry.status().why in line
    assert not any(line.startswith("unlisted") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "fg_fig1_top_eigenvalues", "-p", "widht=3"], "did you mean 'width'"),
        (["run", "fg_fig1_top_eigenvalues", "-p", "eta=-1"], "must be positive"),
        (["run", "fg_fig1_top_eigenvalues", "-p", "eta"], "write name=value"),
        (["run", "nothing"], "no notebook 'nothing'"),
        (["record", "fg_fig1_seed10"], "did you mean fg_fig1_seed10"),
        (["record"], "--missing"),
        (["verify", "nothing"], "no run 'nothing'"),
    ],
)
def test_user_errors_are_one_line_with_the_remedy(arguments, message, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_find_gives_the_entry():
    assert find("fg_fig1_seed100").experiment.seed == 100


def test_the_notebook_s_defaults_are_the_canonical_run():
    from eos_utils.parameters import convert, declared

    notebook = ROOT / "notebooks" / "fg_fig1_top_eigenvalues.ipynb"
    from types import SimpleNamespace

    p = SimpleNamespace(**{d.name: convert(d.name, d.type, d.default) for d in declared(notebook)})
    assert page.experiment(p).key == find("fg_fig1_seed100").experiment.key


def test_other_settings_get_numbers_but_no_verdict(trajectory):
    shown = page.verdicts("fg_fig1_top_eigenvalues", trajectory, "fg_fig1_seed100").data
    assert "no verdict" in shown and "eos-badge" not in shown


def test_provenance_names_key_data_versions_and_command(trajectory):
    from types import SimpleNamespace

    p = SimpleNamespace(eta="2/10", n=100, source="auto")
    shown = page.provenance("fg_fig1_top_eigenvalues", p, trajectory).data
    origin = json.loads(trajectory.attrs["provenance"])
    for part in (
        trajectory.attrs["key"],
        origin["data"]["sha256"][:16],
        origin["versions"]["torch"],
        "papermill notebooks/fg_fig1_top_eigenvalues.ipynb out.ipynb -p source live -p eta 2/10 -p n 100",
        "η = 2/10",
    ):
        assert part in shown


@pytest.mark.parametrize("draw", [figures.sharpness_and_loss, figures.edge_closeup])
def test_figures_come_in_light_and_dark_with_their_alt_text(draw, trajectory):
    alt = "Two panels: eigenvalues over the step, with a dashed line at the edge, and the loss."
    shown = figures.show(draw, trajectory, alt=alt).data
    assert shown.count(alt) == 2 and "only-light" in shown and "only-dark" in shown


def test_a_figure_without_a_description_is_refused(trajectory):
    with pytest.raises(ValueError, match="describe"):
        figures.show(figures.sharpness_and_loss, trajectory, alt="a plot")


def test_figure_shows_the_data(trajectory):
    figure = figures.sharpness_and_loss(trajectory, k=5)
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    for i in range(5):
        assert any(
            len(y) == trajectory.sizes["measured"] and np.allclose(y, trajectory["eigenvalue"][:, i]) for y in drawn
        )
    edge = [line for line in figure.axes[0].lines if line.get_label() == "2/η"]
    assert len(edge) == 1 and edge[0].get_ydata()[0] == pytest.approx(10.0)


def test_readings_and_seeds_can_be_drawn_with_what_is_there(trajectory):
    assert len(figures.small_multiples({"this": trajectory}).axes) == 2
    axis = figures.seeds([], [trajectory]).axes[-1]
    assert axis.lines[0].get_xdata()[0] == 10 * trajectory.attrs["stride"]  # where the window of the entry ends
