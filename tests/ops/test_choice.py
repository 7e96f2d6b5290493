"""The form of a layer is chosen by measurement, once, and kept; what is asked for is done or refused."""

import json
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from twolevel.errors import UserError
from twolevel.ops import Geometry, choice, native, two_level_conv2d
from twolevel.ops.choice import Choices, Form, choose, forms
from twolevel.ops.problem import Problem
from twolevel.ops.store import Store

GEOMETRY = Geometry(padding=(1, 1))


def problem(groups=4, width=8, batch=2, size=6, ranks=1, dtype=torch.float32):
    channels, held = groups * width, groups // ranks
    x = torch.randn(batch, channels // ranks, size, size, dtype=dtype)
    weights = [(channels // ranks, width, 3, 3), (held, width, 3, 3), (channels // ranks, groups, 1, 1)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in weights]
    return Problem(x.contiguous(memory_format=torch.channels_last), *tensors, GEOMETRY, ranks)


@pytest.fixture
def clock(monkeypatch):
    """Counts measurements, and lets the third form be the fastest."""
    measured = []

    def measure(problem, able):
        measured.append(able)
        return {form: 1.0 if index != 2 else 0.5 for index, form in enumerate(able)}

    monkeypatch.setattr(choice, "measure", measure)
    return measured


def test_the_fastest_is_taken_measured_once_and_kept_on_disk(tmp_path, clock, caplog):
    one, file = problem(), tmp_path / "forms.json"
    able = forms(one)
    choices = Choices(Store(file))
    with caplog.at_level(logging.INFO, "twolevel.ops"):
        assert [choices.get(one, able, True).form for _ in range(3)] == [able[2]] * 3
    assert len(clock) == 1 and len(caplog.records) == 1
    assert Choices(Store(file)).get(one, able, True).form == able[2]  # as in the next run
    assert len(clock) == 1
    choices.get(problem(batch=3), able, True)  # another power of two
    assert len(clock) == 2
    assert [kept["form"] for kept in json.loads(file.read_text()).values()] == [[*able[2]]] * 2


@pytest.mark.parametrize(
    "kept", [None, 3, ["overlapped", "grouped"], {"form": ["fused", "magic"], "ms": {}}, {"ms": {}}]
)
def test_a_choice_of_another_kind_is_measured_again(tmp_path, clock, kept):
    one, file = problem(), tmp_path / "forms.json"
    able = forms(one)
    file.write_text(json.dumps({one.line(able): kept}))
    assert Choices(Store(file)).get(one, able, True).form == able[2]
    assert len(clock) == 1


def test_ranks_that_measure_at_once_go_on_with_what_the_first_has_kept(tmp_path, clock, monkeypatch):
    one, file = problem(), tmp_path / "forms.json"
    able = forms(one)
    first, second = Choices(Store(file)), Choices(Store(file))
    assert first.get(one, able, True).form == able[2]
    monkeypatch.setattr(choice, "measure", lambda problem, able: {form: 1.0 for form in able})
    assert second.get(one, able, True).form == able[2]


def test_a_gain_within_the_noise_changes_nothing(tmp_path, monkeypatch):
    one = problem()
    able = forms(one)
    monkeypatch.setattr(choice, "measure", lambda problem, able: {able[0]: 1.0, able[1]: 0.98})
    assert Choices(Store(tmp_path / "forms.json")).get(one, able, True).form == able[0]


def test_nothing_is_measured_without_leave_nor_for_a_small_problem(tmp_path, clock):
    one = problem()
    able = forms(one)
    choices = Choices(Store(tmp_path / "forms.json"))
    assert choices.get(one, able, False).form == able[0]
    assert choose(one, may_measure=True) == able[0]  # a few thousand multiplications
    assert clock == []


def test_a_file_that_cannot_be_written_costs_the_memory_alone(tmp_path, clock):
    (tmp_path / "file").write_text("")
    one = problem()
    able = forms(one)
    choices = Choices(Store(tmp_path / "file" / "forms.json"))
    assert [choices.get(one, able, True).form for _ in range(2)] == [able[2]] * 2
    assert len(clock) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_form_is_measured_and_no_random_number_is_drawn(ranks):
    one = problem(ranks=ranks)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    times = choice.measure(one, forms(one))
    assert times.keys() == set(forms(one))
    assert all(seconds >= 0 for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_dense_is_for_one_rank_alone():
    assert Form("dense", "grouped") in forms(problem())
    assert Form("dense", "grouped") not in forms(problem(ranks=2))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"schedule": "fused"}, Form("fused", "grouped")),
        ({"schedule": "dense"}, Form("dense", "grouped")),
        ({"schedule": "dense", "kernels": "depthwise"}, Form("dense", "grouped")),
        ({"kernels": "depthwise"}, Form("overlapped", "depthwise")),
        ({"schedule": "overlapped", "kernels": "grouped"}, Form("overlapped", "grouped")),
    ],
)
def test_what_is_asked_for_is_taken(asked, found):
    assert choose(problem(), **asked, may_measure=False) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"kernels": "triton"},
            r"kernels='triton' cannot compute \[2, 32, 6, 6\] in torch.float64 on cpu: (x is on cpu|Triton is not).*"
            "; use auto, depthwise, grouped or products$",
        ),
        *(
            (
                {"kernels": kernels},
                rf"kernels='{kernels}' cannot compute \[2, 32, 6, 6\] in torch.float64 on cpu: they are for float32 on "
                "CPUs, not torch.float64 on cpu; use auto, depthwise, grouped or products$",
            )
            for kernels in ("native", "narrow")
        ),
        (
            {"schedule": "fused", "kernels": "products"},
            r"kernels='products' cannot compute \[2, 32, 6, 6\] in torch.float64 on cpu: schedule='fused' has no such "
            "kernels; use auto or grouped$",
        ),
        ({"kernels": "tritton"}, "unknown kernels 'tritton'; did you mean triton?"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(asked, message):
    x, *weights, geometry, _ = problem(dtype=torch.float64)
    with pytest.raises(UserError, match=message) as caught:
        two_level_conv2d(x, *weights, geometry, **asked)
    assert "\n" not in str(caught.value)


def test_ways_for_channels_last_memory_say_so():
    one = problem(ranks=2)
    with pytest.raises(UserError, match=r"they are for channels_last memory; use auto or grouped$"):
        choose(one._replace(x=one.x.contiguous()), kernels="products", may_measure=False)


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
def test_narrow_says_which_groups_it_is_for():
    x, *weights, geometry, _ = problem(groups=4, width=7)
    message = (
        "groups of 7 to 7 channels do not fill its vectors; use auto, depthwise, grouped, native or products$"
    )
    with pytest.raises(UserError, match=message):
        two_level_conv2d(x, *weights, geometry, kernels="narrow")


def test_without_a_compiler_torch_computes_and_that_is_said_once(monkeypatch, caplog):
    for place in ("native", "native.parts"):
        monkeypatch.setattr(f"twolevel.ops.{place}.available", lambda: "no C compiler")
    choice._say_if_without_c.cache_clear()
    with caplog.at_level(logging.WARNING, "twolevel.ops"):
        found = [forms(problem()), forms(problem()), forms(problem(dtype=torch.float64))]
    assert not any(form.kernels in ("native", "narrow") for able in found for form in able)
    said = "two-level convolutions are computed without the C kernels: no C compiler"
    assert [record.getMessage() for record in caplog.records] == [said]
    choice._say_if_without_c.cache_clear()


def test_c_kernels_are_kept_from_memory_that_is_not_what_they_read():
    """Weights of another type, and tensors without memory."""
    one = problem()
    with FakeTensorMode() as mode:
        fake = one._replace(x=mode.from_tensor(one.x))
    for other in (one._replace(local=one.local.double()), fake):
        assert not any(form.kernels in ("native", "narrow") for form in forms(other))
