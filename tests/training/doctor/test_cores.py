"""GPUs of ranks, cores and threads: where they are right and where not."""

import pytest
from doctor_settings import config, imagenet, levels

from twolevel.training.doctor import cores


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
