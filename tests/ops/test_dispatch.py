"""The form of a layer is chosen by measurement, once, and kept; what is asked for is done or refused."""

import dataclasses
import json
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from twolevel.errors import UserError
from twolevel.ops import Geometry, autotune, dispatch, schedules, two_level_conv2d
from twolevel.ops.autotune import Form, Measurements, line, measure
from twolevel.ops.dispatch import able_forms, decide, plan_for, runs
from twolevel.ops.kernels import native, triton
from twolevel.ops.problem import Problem
from twolevel.ops.store import Store

GEOMETRY = Geometry(padding=(1, 1))


def problem(groups=4, width=8, batch=2, size=6, ranks=1, dtype=torch.float32) -> Problem:
    channels = groups * width // ranks
    return Problem(
        batch=batch,
        inputs=channels,
        size=(size, size),
        outputs=channels,
        kernel=(3, 3),
        groups=groups // ranks,
        geometry=GEOMETRY,
        ranks=ranks,
        dtype=dtype,
        device=torch.device("cpu"),
        channels_last=True,
    )


def layer(**options):
    """The arguments of `two_level_conv2d` for such a problem."""
    one = problem(**options)
    return (*one.tensors(), one.geometry)


def find(choices: Measurements, one: Problem, able: list[Form]) -> Form:
    """As `decide` does, of measurements in another folder."""
    return (choices.known(one, able) or choices.measure(one, able, lambda one: runs(one, able))).form


@pytest.fixture
def clock(monkeypatch):
    """Counts measurements, and lets the third form be the fastest."""
    measured = []

    def measure(problem, able, runs):
        measured.append(able)
        return {form: 1.0 if index != 2 else 0.5 for index, form in enumerate(able)}

    monkeypatch.setattr(autotune, "measure", measure)
    return measured


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that is empty, on disk and in this process; every layer is large enough to be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "SMALL_MACS", 0)
    autotune.measurements.cache_clear()
    monkeypatch.setattr(dispatch, "_plans", autotune.Plans())
    yield
    autotune.measurements.cache_clear()


def test_the_fastest_is_taken_measured_once_and_kept_on_disk(tmp_path, clock, caplog):
    one, file = problem(), tmp_path / "forms.json"
    able = able_forms(one)
    choices = Measurements(Store(file))
    with caplog.at_level(logging.INFO, "twolevel.ops"):
        assert [find(choices, one, able) for _ in range(3)] == [able[2]] * 3
    assert len(clock) == 1 and len(caplog.records) == 1
    assert find(Measurements(Store(file)), one, able) == able[2]  # as in the next run
    assert len(clock) == 1
    find(choices, problem(batch=3), able)  # another power of two
    assert len(clock) == 2
    assert [kept["form"] for kept in json.loads(file.read_text()).values()] == [[*able[2]]] * 2


@pytest.mark.parametrize(
    "kept", [None, 3, ["overlapped", "grouped"], {"form": ["fused", "magic"], "ms": {}}, {"ms": {}}]
)
def test_a_choice_of_another_kind_is_measured_again(tmp_path, clock, kept):
    one, file = problem(), tmp_path / "forms.json"
    able = able_forms(one)
    file.write_text(json.dumps({line(one, able): kept}))
    assert find(Measurements(Store(file)), one, able) == able[2]
    assert len(clock) == 1


def test_a_measurement_on_a_gpu_is_of_its_card_cudnn_triton_and_kernels(monkeypatch):
    one = dataclasses.replace(problem(), device=torch.device("cuda"))
    facts = {"card": "H100", "cudnn": 91000, "triton": "triton 3.6.0 kernels 0123abcd"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["card"])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: facts["cudnn"])
    monkeypatch.setattr(triton, "version", lambda: facts["triton"])
    lines = [line(one, [Form("fused", "triton")])]
    assert all(str(fact) in lines[0] for fact in facts.values())
    for other in ({"card": "H200"}, {"cudnn": 92400}, {"triton": "triton 3.6.0 kernels 89abcdef"}):
        facts |= other
        lines.append(line(one, [Form("fused", "triton")]))
    assert len({*lines}) == len(lines)


def test_ranks_that_measure_at_once_go_on_with_what_the_first_has_kept(tmp_path, clock, monkeypatch):
    one, file = problem(), tmp_path / "forms.json"
    able = able_forms(one)
    first, second = Measurements(Store(file)), Measurements(Store(file))
    assert find(first, one, able) == able[2]
    monkeypatch.setattr(autotune, "measure", lambda problem, able, runs: {form: 1.0 for form in able})
    assert find(second, one, able) == able[2]


def test_a_gain_within_the_noise_changes_nothing(tmp_path, monkeypatch):
    one = problem()
    able = able_forms(one)
    monkeypatch.setattr(autotune, "measure", lambda problem, able, runs: {able[0]: 1.0, able[1]: 0.98})
    assert find(Measurements(Store(tmp_path / "forms.json")), one, able) == able[0]


def test_nothing_is_measured_for_a_small_layer(clock):
    one = problem()
    assert decide(one, able_forms(one), may_measure=True).form == able_forms(one)[0]
    assert clock == []


def test_nothing_is_measured_where_it_is_not_the_time_for_it(fresh, clock):
    """The best estimate computes; it is not kept as if it had been measured."""
    *tensors, geometry = layer()
    able = able_forms(problem())
    plans = [plan_for(*tensors, geometry, 1, "auto", "auto", may_measure=may) for may in (False, True, False)]
    assert [plan.form for plan in plans] == [able[0], able[2], able[2]]
    assert len(clock) == 1


def test_in_the_steady_state_nothing_is_decided_again(fresh, clock, monkeypatch):
    *tensors, geometry = layer()
    y = two_level_conv2d(*tensors, geometry)

    def decided(*_, **__):
        raise AssertionError("decided again")

    for name in ("able_forms", "decide"):
        monkeypatch.setattr(dispatch, name, decided)
    monkeypatch.setattr(Problem, "of", decided)
    assert torch.equal(two_level_conv2d(*tensors, geometry), y)
    with pytest.raises(AssertionError, match="decided again"):
        two_level_conv2d(tensors[0][:1], *tensors[1:], geometry)


@pytest.mark.parametrize("change", ["schedule", "kernels", "threads", "memory", "type", "batch", "weight"])
def test_whatever_a_plan_depends_on_makes_another(fresh, clock, change):
    x, *weights, geometry = layer()
    one = plan_for(x, *weights, geometry, 1, "auto", "auto", may_measure=True)
    asked = {"schedule": "fused"} if change == "schedule" else {}
    asked |= {"kernels": "grouped"} if change == "kernels" else {}
    if change == "memory":
        x = x.contiguous()
    if change == "type":
        x, *weights = (tensor.double() for tensor in (x, *weights))
    if change == "batch":
        x = x[:1]
    if change == "weight":
        weights[1] = weights[1].double()
    if change == "threads":
        torch.set_num_threads(2)
    try:
        plan_for(
            x,
            *weights,
            geometry,
            1,
            asked.get("schedule", "auto"),
            asked.get("kernels", "auto"),
            may_measure=True,
        )
    finally:
        torch.set_num_threads(1)
    assert len(dispatch._plans) == 2 and one in dispatch._plans.values()


def test_plans_of_ever_other_sizes_do_not_fill_the_memory(fresh, clock, monkeypatch):
    monkeypatch.setattr(autotune, "MOST_PLANS", 3)
    x, *weights, geometry = layer(batch=9)
    for batch in range(1, 9):
        plan_for(x[:batch], *weights, geometry, 1, "auto", "grouped", may_measure=True)
        assert len(dispatch._plans) <= 3


def test_a_file_that_cannot_be_written_costs_the_memory_alone(tmp_path, clock):
    (tmp_path / "file").write_text("")
    one = problem()
    able = able_forms(one)
    choices = Measurements(Store(tmp_path / "file" / "forms.json"))
    assert [find(choices, one, able) for _ in range(2)] == [able[2]] * 2
    assert len(clock) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_form_is_measured_and_no_random_number_is_drawn(ranks):
    one = problem(ranks=ranks)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    able = able_forms(one)
    times = measure(one, able, lambda one: runs(one, able))
    assert times.keys() == set(able)
    assert all(seconds >= 0 for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fastest", ["overlapped", "fused", "dense"])
def test_a_compiled_layer_takes_the_fastest_form_that_is_not_dense(fresh, monkeypatch, fastest):
    measured, ran = [], []

    def measure(problem, able, runs):
        measured.append(able)
        return {form: 0.5 if form.schedule == fastest else 1.0 for form in able}

    def spied(name, compute):
        def spy(self, *arguments):
            ran.append((type(self), name))
            return compute(self, *arguments)

        return spy

    monkeypatch.setattr(autotune, "measure", measure)
    for kind in (schedules.Overlapped, schedules.Fused):
        for name in ("forward", "backward"):
            monkeypatch.setattr(kind, name, spied(name, getattr(kind, name)))
    *tensors, geometry = layer(dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    compiled = torch.compile(
        lambda *t: two_level_conv2d(*t, geometry), backend="aot_eager", fullgraph=True, dynamic=False
    )
    y = compiled(*leaves)
    gradients = torch.autograd.grad(y, leaves, y.detach())
    torch.compiler.reset()
    kind = schedules.Fused if fastest == "fused" else schedules.Overlapped
    assert ran == [(kind, "forward"), (kind, "backward")]
    assert len(measured) == 1 and {form.schedule for form in measured[0]} == {"overlapped", "fused"}
    wanted = two_level_conv2d(*leaves, geometry, schedule="dense")
    # Sums of some hundred float64 products in another order.
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(wanted, leaves, y.detach()), rtol=1e-10, atol=1e-10
    )


@pytest.fixture
def on_a_card(monkeypatch):
    """A problem on a card; forms "take" what they return."""
    monkeypatch.setattr(autotune, "_seconds", lambda run, device: run())
    return dataclasses.replace(problem(), device=torch.device("cuda"))


@pytest.mark.parametrize("captured", [True, False])
def test_on_a_card_forms_are_timed_without_what_the_host_adds_if_all_can_be_captured(
    on_a_card, monkeypatch, captured
):
    able = able_forms(problem())[:2]
    kernels, host = dict(zip(able, (1.0, 2.0), strict=True)), dict(zip(able, (9.0, 2.0), strict=True))
    asked = []

    def replay_all(calls):
        asked.append([*calls])
        return {form: lambda form=form: kernels[form] for form in calls} if captured else None

    monkeypatch.setattr(autotune, "replays", replay_all)
    times = measure(on_a_card, able, lambda one: [lambda form=form: host[form] for form in able])
    assert times == (kernels if captured else host)
    assert asked == [able]


def test_on_a_card_a_form_that_fails_is_left_out_and_named(on_a_card, monkeypatch, caplog):
    able = able_forms(problem())[:3]

    def fail():
        raise RuntimeError("PassManager::run failed")

    def full():
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(autotune, "replays", lambda calls: None)
    with caplog.at_level(logging.WARNING, "twolevel.ops"):
        assert measure(on_a_card, able, lambda one: [fail, full, lambda: 1.0]) == {able[2]: 1.0}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{able[0]} fails for layers of 32 to 32 channels")
    assert said.endswith("and is left out: PassManager::run failed")
    with pytest.raises(RuntimeError, match="PassManager"):
        measure(on_a_card, able[:2], lambda one: [full, fail])


def test_on_a_cpu_a_form_that_fails_is_an_error():
    def fail():
        raise RuntimeError("a defect")

    able = able_forms(problem())[:2]
    with pytest.raises(RuntimeError, match="a defect"):
        measure(problem(), able, lambda one: [lambda: None, fail])


def test_dense_is_for_one_rank_alone():
    assert Form("dense", "grouped") in able_forms(problem())
    assert Form("dense", "grouped") not in able_forms(problem(ranks=2))


def test_a_schedule_that_waits_for_the_exchange_is_tried_where_that_is_known():
    one, alone = problem(ranks=2), problem()
    fused = {Form("fused", "grouped")} | ({Form("fused", "native")} if native.available() is None else set())
    assert not fused & set(able_forms(one))
    assert fused < set(able_forms(one, exchange_known=True))
    assert set(able_forms(one, "fused")) == fused
    # On one rank nothing is exchanged: one walk over the images is called overlapped.
    assert fused & set(able_forms(alone)) == {Form("fused", "grouped")}


@pytest.mark.parametrize(("exchange_s", "schedule"), [(0.0, "fused"), (0.5, "fused"), (2.0, "overlapped")])
def test_what_it_waits_counts(fresh, monkeypatch, exchange_s, schedule):
    times = {"overlapped": 3.0, "fused": 2.0}
    monkeypatch.setattr(
        autotune, "measure", lambda problem, able, runs: {form: times[form.schedule] for form in able}
    )
    one = problem(ranks=2)
    able = able_forms(one, kernels="grouped", exchange_known=True)
    found = decide(one, able, may_measure=True, exchange_s=exchange_s)
    assert found.form == Form(schedule, "grouped")
    assert found.milliseconds["fused grouped"] == 2000.0 + 1e3 * exchange_s
    assert decide(one, able, may_measure=False, exchange_s=exchange_s) == found._replace(new=False)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"schedule": "fused"}, Form("fused", "grouped" if native.available() else "native")),
        ({"schedule": "fused", "kernels": "grouped"}, Form("fused", "grouped")),
        ({"schedule": "dense"}, Form("dense", "grouped")),
        ({"schedule": "dense", "kernels": "depthwise"}, Form("dense", "grouped")),
        ({"schedule": "dense", "kernels": "native"}, Form("dense", "grouped")),
        ({"kernels": "depthwise"}, Form("overlapped", "depthwise")),
        ({"schedule": "overlapped", "kernels": "grouped"}, Form("overlapped", "grouped")),
    ],
)
def test_what_is_asked_for_is_taken(asked, found):
    assert able_forms(problem(), **asked)[0] == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"kernels": "triton"},
            r"kernels='triton' cannot compute \[2, 32, 6, 6\] in torch.float64 on cpu: (x is on cpu|Triton is not).*"
            "; use auto, depthwise, grouped or products$",
        ),
        (
            {"kernels": "native"},
            r"kernels='native' cannot compute \[2, 32, 6, 6\] in torch.float64 on cpu: they are for float32 on CPUs, "
            "not torch.float64 on cpu; use auto, depthwise, grouped or products$",
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
    with pytest.raises(UserError, match=message) as caught:
        two_level_conv2d(*layer(dtype=torch.float64), **asked)
    assert "\n" not in str(caught.value)


def test_ways_for_channels_last_memory_say_so():
    one = problem(ranks=2)
    why = "they are for channels_last memory and one representative a group"
    with pytest.raises(UserError, match=why + r"; use auto(, grouped or native| or grouped)$"):
        able_forms(dataclasses.replace(one, channels_last=False), kernels="products")


def test_without_a_compiler_torch_computes_and_that_is_said_once(monkeypatch, caplog):
    for place in ("dispatch", "kernels.native.call"):
        monkeypatch.setattr(f"twolevel.ops.{place}.available", lambda: "no C compiler")
    dispatch._warn_without_c.cache_clear()
    with caplog.at_level(logging.WARNING, "twolevel.ops"):
        found = [able_forms(one) for one in (problem(), problem(), problem(dtype=torch.float64))]
    assert not any(form.kernels == "native" for able in found for form in able)
    said = "two-level convolutions are computed without the C kernels: no C compiler"
    assert [record.getMessage() for record in caplog.records] == [said]
    dispatch._warn_without_c.cache_clear()


def test_c_kernels_are_kept_from_memory_that_is_not_what_they_read():
    """Weights of another type, and tensors without memory."""
    x, local, *others, geometry = layer()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for tensors in ((x, local.double(), *others), (fake, local, *others)):
        one = Problem.of(*tensors, geometry, 1)
        assert not any(form.kernels == "native" for form in able_forms(one))


@pytest.mark.parametrize("ms", [None, [], {}, {"fused grouped": "x"}, {"fused grouped": 10**400}, {"x": 1.0}])
def test_a_stored_measurement_without_times_is_measured_again(ms):
    able = [Form("fused", "grouped"), Form("overlapped", "grouped")]
    assert autotune._valid({"form": ["fused", "grouped"], "ms": ms}, able) is None
    good = {"form": ["fused", "grouped"], "ms": {"fused grouped": 1.0}}
    assert autotune._valid(good, able) == good
