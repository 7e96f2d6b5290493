"""The steps of a card's first hour, on what there is without a card: the CPU, Gloo, and kernels by their names."""

import json
import textwrap

import pytest
import torch

from benchmarks.gpu import nccl, parity, profiling, tuning
from benchmarks.gpu.profiling import Span
from benchmarks.kernels import Network
from twolevel.ops.normalise_problem import NormaliseProblem
from twolevel.ops.problem import Problem


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


# ---- parity ----


def test_parity_runs_the_tests_that_ask_for_a_card():
    names = {path.name for path in parity.files()}
    assert {"test_grouped_triton.py", "test_gpu_step.py", "test_replay.py"} <= names
    assert "test_gpu.py" not in names


def test_outcomes_are_counted_and_a_process_that_dies_loses_its_tests(tmp_path, monkeypatch):
    (tmp_path / "test_few.py").write_text(
        textwrap.dedent(
            """
            import os
            import pytest

            def test_passes(): pass
            def test_fails(): assert 1 == 2, "one is not two"
            def test_is_skipped(): pytest.skip("not today")
            def test_dies(): os._exit(1)
            def test_everything_in_the_interpreter(): assert False
            """
        )
    )
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    names = parity.collected([tmp_path / "test_few.py"])
    assert [name.partition("::")[2] for name in names] == [
        "test_passes",
        "test_fails",
        "test_is_skipped",
        "test_dies",
    ]
    found = parity.run(names, processes=4)
    counts = {name: found[name] for name in ("tests", "passed", "failed", "skipped", "lost")}
    assert counts == {"tests": 4, "passed": 1, "failed": 1, "skipped": 1, "lost": 1}
    assert found["failures"] == {"test_few::test_fails": "AssertionError: one is not two"}
    assert [*found["slowest_s"]]


# ---- tuning ----


@pytest.mark.parametrize(("name", "ranks"), [("wrn-10-1/4", 1), ("wrn-10-1/4/4", 4)])
def test_the_layers_that_are_tuned_are_those_that_a_network_computes(name, ranks):
    layers = tuning.problems(Network.named(name), 8, torch.device("cpu"), torch.float32)
    assert len(set(layers)) == len(layers)
    convolutions = [layer for layer in layers if isinstance(layer, Problem)]
    norms = [layer for layer in layers if isinstance(layer, NormaliseProblem)]
    assert len(convolutions) > 4 and len(norms) > 2
    for layer in convolutions:
        assert (layer.batch, layer.ranks, layer.channels_last) == (8, ranks, True)
        assert layer.groups == 4 // ranks and layer.dtype == torch.float32
    for norm in norms:
        assert (norm.batch, norm.memory, norm.relu, norm.odd) == (8, "channels_last", True, "")
    assert max(norm.channels for norm in norms) == 64 // ranks


def test_every_layer_that_is_tuned_gets_a_form(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layers = tuning.problems(Network.named("wrn-10-1/4"), 2, torch.device("cpu"), torch.float32)
    found = tuning.measure(layers, processes=1)
    assert [one["layer"] for one in found["layers"]] == [layer.title() for layer in layers]
    assert all(not one["compiled"].startswith("dense") for one in found["layers"])
    assert found["cannot_compile"] == []
    json.dumps(found)


# ---- profiles ----


def test_our_kernels_are_told_from_others_by_their_names():
    pytest.importorskip("triton")
    assert {"gather_product", "tap_product", "join_moments"} <= profiling.our_kernels()
    assert profiling.kind("gather_product") == profiling.OURS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_add_3", "fused by the compiler"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolutions"),
        ("cutlass_tensorop_bf16_s16816dgrad_optimized", "convolutions"),
        ("void cudnn::bn_fw_tr_1C11_singleread<float>", "batch norm"),
        ("void at::native::batch_norm_backward_reduce_channels_last_kernel", "batch norm"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "copies, casts, layouts"),
        ("Memcpy DtoD (Device -> Device)", "copies, casts, layouts"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("void at::native::(anonymous)::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimiser"),
        ("ncclDevKernel_AllGather_RING_LL", "NCCL"),
        ("void at::native::reduce_kernel<512, 1>", "sums"),
        ("void at::native::vectorized_elementwise_kernel<4, threshold>", "elementwise"),
        ("something", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(name, kind):
    assert profiling.kind(name) == kind


def test_a_breakdown_counts_overlaps_once_and_what_is_left_is_idle():
    spans = [Span("reduce", 0, 1000), Span("gemm", 500, 1500), Span("gemm", 3000, 3500)]
    found = profiling.breakdown(spans, steps=1, wall_ms=4.0)
    assert (found["busy_ms"], found["idle"]) == (2.0, 0.5)
    assert found["kinds_ms"] == {"products": 1.5, "sums": 1.0}
    assert found["kernels"] == [
        {"name": "gemm", "kind": "products", "ms": 1.5, "calls": 2},
        {"name": "reduce", "kind": "sums", "ms": 1.0, "calls": 1},
    ]
    assert profiling.breakdown(spans, steps=2, wall_ms=0.5)["idle"] == 0.0
    assert "idle 50%" in profiling.table("a peer", found)


def test_a_step_is_profiled(tmp_path):
    tiny = "--device cpu --model wrn-10-1 --batch 2 --turns 2 --groups 4 --peers sc gc2l".split()
    profiling.main([*tiny, "--output", str(tmp_path / "profile.json")])
    found = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert [*found] == ["sc, G=1", "gc2l, G=4"]
    names = {kernel["name"] for kernel in found["sc, G=1"]["kernels"]}
    assert any("convolution" in name for name in names)


# ---- NCCL ----


@pytest.mark.parametrize(
    ("cards", "version", "why"),
    [(1, (2, 28, 9), "this is 2.28.9"), (1, (2, 30, 7), None), (2, (2, 28, 9), None)],
)
def test_ranks_share_a_card_only_where_nccl_can(monkeypatch, cards, version, why):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    found = nccl.unavailable()
    assert (found is None) == (why is None)
    assert why is None or found.endswith(why)


def checks_on_cpus() -> dict:
    nccl.STEPS = 4
    nccl.WIDTH, nccl.BATCH = "wrn-10-1", 8
    return nccl.checks("cpu")


def test_two_ranks_are_asked_for_what_they_can_do_here_too(pool):
    """Over Gloo, and without graphs."""
    for found in pool.run(checks_on_cpus, ranks=2, init=False):
        assert nccl.wrong(found) == []
        assert found["all-gather"] and found["reduce-scatter"]
        assert all(found[name]["trains"] for name in ("groups", "replicas", "replicas, synchronised"))


def test_a_check_that_fails_is_named():
    found = {"backend": "gloo", "all-gather": False, "groups": {"trains": True, "same as a graph": False}}
    assert nccl.wrong(found) == ["all-gather", "groups: same as a graph"]
