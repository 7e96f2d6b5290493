"""Limits of the system, of containers and of jobs: where they are right and where not."""

import resource
import time
from pathlib import Path

import pytest
import torch
from doctor_settings import GPU, config, imagenet, levels, world

from twolevel.training.doctor import cgroup, limits


def limited(monkeypatch, **soft: int) -> None:
    of = {getattr(resource, f"RLIMIT_{name}"): value for name, value in soft.items()}
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: (of.get(which, endless), endless))


@pytest.fixture
def free(monkeypatch):
    """No limits."""
    limited(monkeypatch)
    monkeypatch.setattr(cgroup, "memory", lambda: None)
    monkeypatch.setattr(cgroup, "cores", lambda: None)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


def test_no_limits_are_right(free):
    assert {*levels(limits.check(world(2, GPU), config())).values()} == {"ok"}


@pytest.mark.parametrize(
    ("limit", "value", "what"),
    [
        ("NOFILE", 256, "open files"),
        ("NPROC", 100, "processes"),
        ("MEMLOCK", 2**16, "locked memory"),
    ],
)
def test_a_limit_that_is_low(free, monkeypatch, limit, value, what):
    limited(monkeypatch, **{limit: value})
    found = {each.what: each for each in limits.check(world(2, GPU), imagenet(4))}
    assert found[what].level == "warning" and "ulimit" in found[what].advice
    assert {each.level for name, each in found.items() if name != what} == {"ok"}


def test_more_ranks_and_workers_need_more_files(free, monkeypatch):
    limited(monkeypatch, NOFILE=1024)
    assert levels(limits.check(world(8), config()))["open files"] == "ok"
    assert levels(limits.check(world(512), config()))["open files"] == "warning"
    assert levels(limits.check(world(8), imagenet(64)))["open files"] == "warning"


def test_locked_memory_is_of_no_matter_to_cpus(free):
    assert "locked memory" not in levels(limits.check(world(2), config()))


def test_the_memory_of_a_container(free, monkeypatch):
    monkeypatch.setattr(cgroup, "memory", lambda: cgroup.Memory(2**33, 2**30))
    assert levels(limits.check(world(2), config()))["memory limit"] == "ok"
    monkeypatch.setattr(cgroup, "memory", lambda: cgroup.Memory(2**30, 2**29))
    found = {each.what: each for each in limits.check(world(4), imagenet(4))}["memory limit"]
    assert found.level == "warning" and "1.0 GiB, of which 512 MiB are used" in found.finding


def test_the_cpu_quota_of_a_container(free, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cgroup, "cores", lambda: 4.0)
    assert levels(limits.check(world(2), config()))["cpu quota"] == "ok"
    monkeypatch.setattr(cgroup, "cores", lambda: 2.0)
    found = {each.what: each for each in limits.check(world(2), config())}["cpu quota"]
    assert found.level == "warning" and "OMP_NUM_THREADS=1" in found.advice


@pytest.mark.parametrize(("left", "level"), [(7300, "ok"), (300, "warning"), (-10, "problem")])
def test_the_time_limit_of_a_slurm_job(free, monkeypatch, left, level):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left)))
    (found,) = (each for each in limits.check(world(), config()) if each.what == "time limit")
    assert found.level == level


def write_all(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups_version_2(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/step\n")
    write_all(
        tmp_path / "cgroup" / "job" / "step", memory__max="max", memory__current="70", cpu__max="max 100000"
    )
    assert cgroup.memory() is None and cgroup.cores() is None
    write_all(
        tmp_path / "cgroup" / "job", memory__max="100\n", memory__current="90\n", cpu__max="150000 100000\n"
    )
    write_all(tmp_path / "cgroup" / "job", memory__stat="anon 5\ninactive_file 30\n")
    assert cgroup.memory() == cgroup.Memory(100, 60) and cgroup.cores() == 1.5


def test_limits_of_control_groups_version_1_seen_from_within_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n")
    write_all(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="10")
    assert cgroup.memory() is None and cgroup.cores() is None
    write_all(tmp_path / "memory", memory__limit_in_bytes="100", memory__stat="total_inactive_file 4")
    write_all(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroup.memory() == cgroup.Memory(100, 6) and cgroup.cores() is None
    write_all(tmp_path / "cpu", cpu__cfs_quota_us="50000")
    assert cgroup.cores() == 0.5
