"""Each check of `twolevel doctor`, where it is satisfied and where it is not."""

import os
import resource
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command import run, write_image_folder
from torchvision.datasets import CIFAR10

from twolevel.analysis.planner import presets
from twolevel.analysis.planner.machine import Link
from twolevel.data import DataConfig
from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig
from twolevel.training.doctor import cgroup, cores, dataset, finding, limits, links, room
from twolevel.training.doctor.finding import Finding, ok, problem, warning

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def world(
    size: int = 1, device: torch.device = CPU, local: int | None = None, backend: str = "gloo"
) -> World:
    return World(0, size, 0, local or size, device, backend, "none")


def config(**sections) -> TrainConfig:
    return TrainConfig(**{"model": ModelConfig("wrn-10-1", "gc2l", 4)} | sections)


def levels(findings) -> dict[str, str]:
    return {each.what: each.level for each in findings}


def imagenet(workers: int, batch: int = 256) -> TrainConfig:
    return config(data=DataConfig("imagenet", workers=workers, batch_size=batch))


# ---- what ranks say together


def test_what_all_ranks_say_is_said_once():
    wrong = warning("limit", "3 of 4", "raise it")
    reports = [("a", [wrong]), ("b", [wrong])]
    assert finding.merge(reports) == [wrong]
    assert finding.merge([("a", [ok("limit", "5")]), ("b", [ok("limit", "6")])]) == [ok("limit", "5")]


def test_of_what_only_some_say_they_are_named():
    good = ok("limit", "9 of 4")
    reports = [
        ("a", [good]),
        ("b", [warning("limit", "3 of 4", "raise it")]),
        ("b", [warning("limit", "2 of 4", "raise it")]),
        ("c", [problem("limit", "none", "give some")]),
    ]
    assert finding.merge(reports) == [
        warning("limit", "ranks 1, 2 on b: 3 of 4", "raise it"),
        problem("limit", "rank 3 on c: none", "give some"),
    ]


def test_a_rank_that_does_not_look_is_not_counted():
    lost = problem("data", "lost", "find it")
    assert finding.merge([("a", [lost]), ("a", [])]) == [lost]


def test_many_ranks_are_not_all_named():
    assert finding.naming(range(40), ["a"] * 40) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 32 more on a"


@pytest.mark.parametrize(("number", "text"), [(5, "5 bytes"), (2**26, "64.0 MiB"), (1.5 * 2**40, "1.5 TiB")])
def test_bytes_for_people(number, text):
    assert finding.size(number) == text


def fail_on_rank_1() -> str:
    def look():
        if dist.get_rank() == 1:
            raise PermissionError(13, "Permission denied", "/x")
        return 1

    try:
        finding.gather(look)
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_look_that_fails_on_one_rank_fails_on_all(pool):
    first, second = pool.run(fail_on_rank_1, ranks=2)
    assert (first, second) == ("rank 1: /x: Permission denied", "/x: Permission denied")


def test_an_error_of_a_check_is_its_finding():
    def check():
        yield ok("a", "b")
        raise UserError("x=3 is invalid; use 2; or 4")

    assert finding.guarded("x", check) == [problem("x", "x=3 is invalid", "use 2; or 4")]


# ---- GPUs, cores, threads


def rank_report(**changes) -> dict:
    return {"host": "a", "cores": [0, 1, 2, 3], "threads": 2, "workers": 0, "omp": "2", "gpu": None} | changes


@pytest.mark.parametrize(
    ("reports", "level", "words"),
    [
        ([rank_report()] * 2, "ok", "2 ranks with 4 threads in all on 4 cores of a, OMP_NUM_THREADS is 2"),
        ([rank_report(omp=None)] * 2, "ok", "unset: cores are divided"),
        ([rank_report(threads=4)] * 2, "warning", "set OMP_NUM_THREADS=2"),
        ([rank_report(threads=1)], "warning", "more than half of the cores are idle: set OMP_NUM_THREADS=4"),
        ([rank_report(threads=1)] * 5, "warning", "start 4 ranks or fewer"),
    ],
)
def test_threads_and_cores(reports, level, words):
    (found,) = cores.check(reports)
    assert (found.what, found.level) == ("threads", level) and words in f"{found.finding}; {found.advice}"


def test_each_machine_has_its_own_cores():
    found = [*cores.check([rank_report(), rank_report(host="b", threads=8)])]
    assert [each.level for each in found] == ["ok", "warning"] and "of b" in found[1].finding


def test_ranks_that_share_a_gpu_are_named():
    (gpus, threads) = cores.check([rank_report(gpu="A"), rank_report(gpu="A"), rank_report(gpu="B")])
    assert gpus.level == "warning" and "ranks 0, 1 on a share one GPU" in gpus.finding
    assert "--nproc-per-node 2" in gpus.advice and threads.level == "ok"
    assert levels(cores.check([rank_report(gpu="A"), rank_report(gpu="B")]))["gpu of a rank"] == "ok"


def test_data_workers_need_cores_beside_gpus():
    (_, found) = cores.check([rank_report(gpu="A", workers=4)])
    assert found.level == "warning" and "use --workers 3" in found.advice
    assert cores.decoding(imagenet(4)) == 4 and cores.decoding(config()) == 0


# ---- limits


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


# ---- room

Usage = namedtuple("Usage", "total used free")


def disk(monkeypatch, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, total - free, free))


def test_the_bytes_of_a_checkpoint_are_those_that_a_run_writes(pool, tiny, tmp_path):
    run(pool, "train", *tiny, "--max-steps", 1, "--ema-decay", 0.9, "--output", tmp_path)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
    settings = config(
        data=DataConfig("imagenet", data_root=Path(tiny[tiny.index("--data-root") + 1]), image_size=16),
        optimiser=OptimiserConfig(ema_decay=0.9),
        run=RunConfig(precision="float64"),
    )
    number = room.checkpoint_bytes(settings)
    assert number < written < 1.2 * number  # names, shapes and random states, of a network this small


def test_fewer_parts_take_fewer_bytes():
    whole = room.checkpoint_bytes(config(optimiser=OptimiserConfig(ema_decay=0.9)))
    without_average = room.checkpoint_bytes(config())
    assert room.checkpoint_bytes(config(optimiser=OptimiserConfig(momentum=0))) < without_average < whole


def test_the_checkpoints_that_are_kept():
    assert room.kept(config()) == 3
    run_config = RunConfig(keep_checkpoints=1, keep_best=False, keep_epochs=50)
    assert room.kept(config(run=run_config)) == 1 + 200 // 50


def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    disk(monkeypatch, 10_000, 4_000)
    assert levels(room.check_room(config(), 1_000, 1, tmp_path / "new"))["room"] == "ok"
    found = next(room.check_room(config(), 1_001, 1, tmp_path / "new"))
    assert found.level == "problem" and "--keep-checkpoints" in found.advice
    step = tmp_path / "checkpoints" / "step-00000001"  # has its room already
    step.mkdir(parents=True)
    (step / "shard").write_bytes(bytes(1_001))
    assert levels(room.check_room(config(), 1_001, 1, tmp_path))["room"] == "ok"


def test_a_file_system_without_room_for_more_files(tmp_path, monkeypatch):
    disk(monkeypatch, 10_000, 4_000)
    Status = namedtuple("Status", "f_files f_favail")
    for status, level in ((Status(100, 5), "problem"), (Status(0, 0), None), (Status(10_000, 9_000), "ok")):
        monkeypatch.setattr(os, "statvfs", lambda path, status=status: status)
        assert levels(room.check_room(config(), 1, 1, tmp_path)).get("files") == level


def test_shared_memory(monkeypatch):
    monkeypatch.setattr(room, "SHM", Path("/"))
    disk(monkeypatch, 2**26, 2**26)
    assert levels(room.check_shm(config(), world())) == {"/dev/shm": "ok"}
    assert levels(room.check_shm(config(), world(2, GPU))) == {"/dev/shm": "warning"}
    (found,) = room.check_shm(imagenet(4), world())
    assert found.level == "problem" and "--shm-size=8g" in found.advice
    disk(monkeypatch, 2**34, 2**34)
    assert levels(room.check_shm(imagenet(4), world(4, GPU))) == {"/dev/shm": "ok"}


# ---- data


def data_level(settings: DataConfig, local_rank: int = 0) -> Finding:
    where = World(local_rank, 2, local_rank, 2, CPU, "gloo", "none")
    return next(iter(dataset.check(where, settings)), None)


def test_folders_of_images(tmp_path):
    settings = DataConfig("imagenet", data_root=write_image_folder(tmp_path), image_size=16)
    good = data_level(settings)
    assert good.level == "ok" and "24 images in train, 7 images in val" in good.finding
    assert data_level(settings, local_rank=1) is None  # one of a machine looks
    broken = tmp_path / "val" / "class1" / "01.png"
    broken.write_bytes(broken.read_bytes()[:40])
    found = data_level(settings)
    assert found.level == "problem" and f"{broken} is not a readable image" in found.finding
    for path in (tmp_path / "val" / "class1").iterdir():
        path.unlink()
    assert "class1 holds no images" in data_level(settings).finding
    shutil.rmtree(tmp_path / "val" / "class1")
    assert "differ in 1 classes (class1)" in data_level(settings).finding


def test_files_of_cifar(tmp_path, monkeypatch):
    assert "no folder" in data_level(DataConfig("cifar10", data_root=tmp_path)).finding
    later = data_level(DataConfig("cifar10", data_root=tmp_path, download=True))
    assert later.level == "warning" and "fetches it when the run starts" in later.advice
    assert not any(tmp_path.iterdir())
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in ("part", "meta"):
        (folder / name).write_bytes(b"x")
    md5 = "9dd4e461268c8034f5c8564e155c67a6"  # of b"x"
    monkeypatch.setattr(CIFAR10, "train_list", [["part", md5]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "md5": md5})
    assert data_level(DataConfig("cifar10", data_root=tmp_path)).level == "ok"
    (folder / "part").write_bytes(b"y")
    found = data_level(DataConfig("cifar10", data_root=tmp_path))
    assert found.level == "problem" and "part is damaged: its md5" in found.finding
    (folder / "part").unlink()
    assert "is incomplete: no file" in data_level(DataConfig("cifar10", data_root=tmp_path)).finding


def test_the_sample_is_always_there():
    assert data_level(DataConfig("sample")).level == "ok"


# ---- links


def link(latency: float, bandwidth: float) -> Link:
    return Link(name="some", latency=latency, bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("latency", "bandwidth", "wrong"),
    [(1e-5, 2e9, []), (2.9e-5, 0.5e9, []), (4e-5, 1e9, ["latency"]), (1e-5, 0.3e9, ["bandwidth"])],
)
def test_a_link_beside_what_is_assumed(latency, bandwidth, wrong):
    found = links.compare(link(latency, bandwidth), link(1e-5, 1e9), one_machine=False)
    assert [each.what for each in found if each.level == "warning"] == wrong


def test_what_is_assumed_of_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert links.assumed_link(world(2), None) == presets.link("loopback")
    assert links.assumed_link(world(4, local=2), None) == presets.link("ethernet-10g")
    assert links.assumed_link(world(2), "h100") == presets.link("nvlink-h100")
    own = Link(name="own", latency=1.0, bandwidth=1.0, source="measured by all-gathers")
    machine = presets.machine("titan-rtx").with_links(own, presets.link("ethernet-10g"), None)
    machine.save(tmp_path / "twolevel" / "machine-cpu-float32-1.json")
    assert links.assumed_link(world(2), None) == own
    assert links.assumed_link(world(4, local=2), None) == presets.link("ethernet-10g")


@pytest.mark.parametrize("ranks", range(2, 10))
def test_rounds_hold_every_pair_of_the_ring_and_each_rank_once(ranks):
    made = links.rounds(ranks)
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in made)
    every = {frozenset((rank, (rank + 1) % ranks)) for rank in range(ranks)}
    assert {frozenset(pair) for pairs in made for pair in pairs} == every


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ({}, None),
        ({(1, 2): 9.0}, "ranks 1, 2 on b, c"),
        ({(0, 1): 9.0, (1, 2): 7.0}, "rank 1 on b"),
    ],
)
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_pair_or_rank_that_is_slow_is_named(ranks, slow, named):
    seconds = {pair: slow.get(pair, 1.0) for pairs in links.rounds(ranks) for pair in pairs}
    found = links.slow_links(seconds, list("abcd")[:ranks])
    assert (found.level == "warning") == (named is not None)
    assert named is None or f"but {named}" in found.finding


def of_slow_rank(factor: float) -> list[Finding]:
    seconds = factor if dist.get_rank() == 1 else 1.0
    with mock.patch.object(links, "compute_seconds", lambda device: seconds):
        return [*links.check_speed(world())]


def test_a_rank_that_computes_slowly_is_named(pool):
    (found,), other = pool.run(of_slow_rank, 5.0, ranks=2)
    assert found.level == "warning" and f"rank 1 on {socket.gethostname()} takes" in found.finding
    assert other == [found]
    assert pool.run(of_slow_rank, 1.5, ranks=2)[0][0].level == "ok"


def of_clock(ahead: float) -> list[Finding]:
    off = ahead if dist.get_rank() == 1 else 0.0
    with mock.patch.object(links, "now", lambda: time.time() + off):
        return [*links.check_clocks()]


def test_a_clock_that_is_off_is_named(pool):
    (found,), _ = pool.run(of_clock, -5.0, ranks=2)
    assert found.level == "warning" and "rank 1 on " in found.finding and "-5.0 s beside" in found.finding
    assert pool.run(of_clock, 0.0, ranks=2)[0][0].level == "ok"


def real_links() -> list[Finding]:
    here = World(dist.get_rank(), 3, dist.get_rank(), 3, CPU, "gloo", "torchrun")
    return [*links.check_link(here, None, "group"), *links.check_pairs(here), *links.check_speed(here)]


def test_links_are_measured_on_real_ranks(pool):
    """How fast they are is not asserted: other processes run here too."""
    found = pool.run(real_links, ranks=3)
    whats = {"latency", "bandwidth", "pairs of ranks", "speed of a rank"}
    assert all({each.what for each in of_rank} == whats for of_rank in found)
