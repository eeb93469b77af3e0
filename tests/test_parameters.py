"""Notebook parameters: what is declared is accepted in its type, what is not is refused by name."""

import pathlib

import pytest

from eos_utils import parameters as subject
from eos_utils.parameters import ParameterError, check_given, convert, declared, parameters

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def namespace(**injected):
    """A notebook's globals after its parameters cell, some imports, and what papermill injected."""
    space = {"In": [], "Out": {}, "_i": "", "pathlib": pathlib, "parameters": parameters}
    exec('eta: "rational" = "2/30"\nwidth: int = 128\nfast: bool = False\nloss: str = "half_mse"', space)
    return {**space, **injected}


def test_declared_values_come_back_in_their_types():
    p = parameters(namespace(eta="2/50", width="256", fast="true"))
    assert vars(p) == {"eta": "2/50", "width": 256, "fast": True, "loss": "half_mse"}


def test_unknown_name_is_refused_with_a_hint():
    with pytest.raises(ParameterError, match=r"'widht'; did you mean 'width'\?"):
        parameters(namespace(widht=256))


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", "wide"), ("width", 1.5), ("width", True), ("width", None), ("fast", "maybe"), ("fast", 1)],
)
def test_wrong_type_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"{name}=.*not of the declared type"):
        parameters(namespace(**{name: value}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("int", -1), ("int", 10**30), ("int", "1e300"), ("float", "nan"), ("float", float("inf")), ("float", "-1e999")],
)
def test_numbers_out_of_any_range_are_refused(kind, value):
    with pytest.raises(ParameterError, match="draws=.*out of range"):
        convert("draws", kind, value)
    assert convert("draws", "int", 10**9) == 10**9 and convert("draws", "float", "-2.5") == -2.5


def test_a_source_that_does_not_exist_is_refused_on_every_page():
    with pytest.raises(ParameterError, match="source='recrded'.*auto, recorded, live"):
        convert("source", "str", "recrded")
    assert convert("source", "str", "live") == "live"


@pytest.mark.parametrize("eta", ["0", "-2/30", "2/0", "nan", "inf", "__import__('os')", "", True])
def test_bad_step_sizes_are_refused_and_never_evaluated(eta):
    with pytest.raises(ParameterError, match="eta"):
        parameters(namespace(eta=eta))


@pytest.mark.parametrize("eta", ["2/50", "0.04", 0.04, 1])
def test_a_step_size_is_a_number_or_a_fraction(eta):
    assert convert("eta", "rational", eta) == str(eta)


def test_an_undeclarable_type_is_named():
    space = {}
    exec("x: complex = 1", space)
    with pytest.raises(ParameterError, match="complex"):
        parameters(space)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_a_notebook_has_a_type_and_a_help_text(notebook):
    found = declared(notebook)
    assert found
    for p in found:
        assert p.type in subject.TYPES, p
        assert len(p.help) > 5, p


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_unknown_parameters_are_refused_before_papermill_runs(notebook):
    with pytest.raises(ParameterError, match="no parameter 'etta'"):
        check_given(notebook, {"etta": "2/50"})
