"""Train on a Ray cluster, or by a Ray of its own on this machine (pip install 'twolevel[ray]').

python launch/ray_train.py --workers 4 -- ARGUMENTS of twolevel train...
python launch/ray_train.py --workers 4 --gpus -- --model wrn-28-10 --conv gc2l --groups 4 --data cifar10

RAY_ADDRESS says which cluster; `ray job submit` sets it. Every machine needs twolevel, and the folder in which this is
started, at the same path. With --min-workers 1 the run goes on when a worker or a machine is lost, on as many workers
as there is room for, from its newest checkpoint: --mesh auto and --resume are added.
"""

import argparse
import logging
import os
import shutil
import sys

from twolevel import cli
from twolevel.cli.train import configure
from twolevel.errors import LOST_RANK, LostRank, UserError
from twolevel.launchers import LOOPBACK, listening

# No statistics sent home; every line, with no colour; no other folder to work in. Ray reads some when it is imported.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
SETTINGS |= {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
os.environ.update(SETTINGS | os.environ)

try:
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.backend import Backend
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError as error:
    sys.exit(f"launch/ray_train.py: {error}; pip install 'twolevel[ray]'")


def quiet() -> None:
    """In every process of Ray: one of its own warns every second where there is no dashboard."""
    name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(name).setLevel(logging.ERROR)


class NoGroup(TorchConfig):
    """Ray makes no process group. twolevel makes its own, as under torchrun: for one that exists it has no store, so no
    watchdog names a lost rank, no rank can be a spare, and Ray's would serve GPUs or CPUs alone."""

    class Workers(Backend):
        share_cuda_visible_devices = True  # so that NCCL can copy between the GPUs of a machine

    backend_cls = Workers


def train(given: dict) -> int:
    """A worker: `twolevel train` as one rank. Returns its status; what another try may mend is raised, for Ray."""
    os.chdir(given["folder"])
    own, place = ray.train.get_context(), None
    rank, size, local = own.get_world_rank(), own.get_world_size(), own.get_local_world_size()
    if rank == 0:
        with listening() as free:
            place = LOOPBACK if size == local else ray.util.get_node_ip_address(), free.getsockname()[1]
    address, port = broadcast_from_rank_zero(place)
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": own.get_local_rank(), "LOCAL_WORLD_SIZE": local}
    ranks |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    status = cli.main(["train", *given["words"]])
    if status == LOST_RANK:
        raise LostRank(f"rank {rank} lost another one")
    return status


def status_of(error: TrainingFailedError) -> int:
    """75 where workers were lost, which another try may mend; 1 where one of them, or Ray, raised anything else."""
    if not isinstance(error, WorkerGroupError):
        return 1
    raised = [getattr(each, "_base_exc", None) for each in error.worker_failures.values()]  # None: it is gone
    return LOST_RANK if all(each is None or isinstance(each, LostRank) for each in raised) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="launch/ray_train.py --workers N ... -- ARGUMENTS of twolevel train..."
    )
    parser.add_argument("--workers", type=int, required=True, help="ranks, at most")
    parser.add_argument("--min-workers", type=int, help="with how many the run goes on; fixed unless given")
    parser.add_argument("--restarts", type=int, default=3, help="with --min-workers: how often at most")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each")
    parser.add_argument("--cpus", type=int, default=1, help="cores, and threads, of each")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, words = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if own.min_workers is not None:
        words += ["--mesh", "auto", "--resume"]
    if not 1 <= (own.min_workers or own.workers) <= own.workers or own.cpus < 1 or own.restarts < 0:
        parser.error(
            "use --workers of 1 or more, --min-workers from 1 to that, --cpus 1 or more, --restarts 0 or more"
        )
    try:
        output = configure(words).output.resolve()  # refused before any worker starts
    except UserError as error:
        print(f"twolevel train: {error}", file=sys.stderr)
        return 2
    alone = {"address": "local", "num_cpus": own.workers * own.cpus, "include_dashboard": False}
    where = {} if os.environ.get("RAY_ADDRESS") else alone
    ray.init(**where, runtime_env={"worker_process_setup_hook": quiet})
    least, found = own.min_workers or own.workers, ray.cluster_resources().get("GPU", 0)
    if where and own.gpus and found < least:  # it would wait for ever
        print(
            f"launch/ray_train.py: --gpus: Ray finds {found:g} GPUs here for {least} workers", file=sys.stderr
        )
        return 2
    elastic = own.min_workers is not None
    trainer = TorchTrainer(
        train,
        train_loop_config={"words": words, "folder": os.getcwd()},
        torch_config=NoGroup(),
        scaling_config=ScalingConfig(
            num_workers=(own.min_workers, own.workers) if elastic else own.workers,
            use_gpu=own.gpus,
            resources_per_worker={"CPU": own.cpus} | ({"GPU": 1} if own.gpus else {}),
        ),
        run_config=RunConfig(
            storage_path=str(output.parent),
            name=f".{output.name}.ray",
            failure_config=FailureConfig(
                max_failures=own.restarts if elastic else 0,
                max_preemption_failures=-1 if elastic else 0,
            ),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        print(f"launch/ray_train.py: {error}", file=sys.stderr)
        return status_of(error)
    except (SystemExit, KeyboardInterrupt):  # Ctrl-C or SIGTERM: Ray has ended its workers, and would say 0
        print("launch/ray_train.py: ended at once; go on with --resume", file=sys.stderr)
        return 130
    finally:
        ray.shutdown()
        shutil.rmtree(output.parent / f".{output.name}.ray", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
