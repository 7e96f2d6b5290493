"""Which kernels normalise is measured once, kept, and depends on all that matters."""

import dataclasses
from functools import partial

import pytest
import torch

from twolevel.errors import UserError
from twolevel.ops import autotune, normalise_dispatch
from twolevel.ops.kernels import native
from twolevel.ops.normalise_dispatch import able_forms, normaliser_for
from twolevel.ops.normalise_problem import NormaliseProblem


def problem(**changes) -> NormaliseProblem:
    usual = NormaliseProblem(4, 16, (32, 32), True, 1, torch.float32, torch.device("cpu"), "channels_last")
    return dataclasses.replace(usual, **changes)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that is empty, on disk and in this process; the last of the candidates is the fastest."""
    measured = []

    def measure(problem, able, runs):
        measured.append(problem.title())
        return {form: 1.0 / (1 + index) for index, form in enumerate(able)}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "SMALL_VALUES", 0)
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(normalise_dispatch, "_chosen", {})
    autotune.measurements.cache_clear()
    yield measured
    autotune.measurements.cache_clear()


def choose(x, kernels="auto", may_measure=True):
    weight, bias = torch.ones(2, x.shape[1]).to(x)
    return normaliser_for(x, weight, bias, True, 1, kernels, may_measure=may_measure).name


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
def test_the_fastest_is_taken_and_measured_once(fresh):
    x = torch.ones(4, 16, 32, 32).to(memory_format=torch.channels_last)
    first, *_, last = able_forms(problem())
    assert choose(x, may_measure=False) == first.kernels and not fresh
    assert [choose(x) for _ in range(3)] == [last.kernels] * 3
    assert fresh == ["batch norm and ReLU of 16 channels of 32x32, float32 channels_last"]
    normalise_dispatch._chosen.clear()
    assert choose(x) == last.kernels and len(fresh) == 1  # as in the next run


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
def test_nothing_is_measured_for_small_maps_which_torch_normalises(fresh, monkeypatch):
    monkeypatch.setattr(autotune, "SMALL_VALUES", 1 << 16)
    assert choose(torch.ones(1, 16, 8, 8)) == "torch"
    assert choose(torch.ones(1, 16, 8, 8), "native") == "native"
    assert not fresh


def test_every_form_is_measured_and_no_random_number_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for one in (problem(), problem(memory="contiguous"), problem(replicas=2), problem(relu=False)):
        able = able_forms(one)
        times = autotune.measure(one, able, partial(normalise_dispatch.runs, able=able))
        assert times.keys() == set(able)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "one",
    [
        problem(dtype=torch.float64),
        problem(device=torch.device("meta")),
        problem(memory="strided"),
        problem(odd="a FakeTensor"),
    ],
    ids=["float64", "meta", "strided", "odd"],
)
def test_kernels_are_kept_from_memory_that_is_not_what_they_read(one):
    assert [form.kernels for form in able_forms(one)] == ["torch"]
    with pytest.raises(
        UserError, match=r"^kernels='native' cannot compute batch norm and ReLU of 16 channels"
    ) as e:
        able_forms(one, "native")
    assert str(e.value).endswith("use auto or torch")


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"unknown kernels 'natve'; did you mean native\?"):
        able_forms(problem(), "natve")


@pytest.mark.parametrize("change", ["kernels", "threads", "memory", "type", "batch", "weight"])
def test_whatever_a_choice_depends_on_makes_another(fresh, change):
    x = torch.ones(4, 16, 8, 8).to(memory_format=torch.channels_last)
    choose(x)
    if change == "memory":
        x = x.contiguous()
    if change == "type":
        x = x.double()
    if change == "batch":
        x = x[:2]
    try:
        torch.set_num_threads(2 if change == "threads" else 1)
        if change == "weight":
            normaliser_for(x, None, None, True, 1, "auto", may_measure=True)
        else:
            choose(x, "torch" if change == "kernels" else "auto")
    finally:
        torch.set_num_threads(1)
    assert len(normalise_dispatch._chosen) == 2
