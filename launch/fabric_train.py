"""A training loop of one's own under Lightning Fabric, with a network that is cut by channel group.

pip install 'twolevel[fabric]'

python launch/fabric_train.py --ranks 4 -- --model wrn-16-2 --conv gc2l --groups 4 --data sample --max-steps 100
torchrun --nproc-per-node 4 launch/fabric_train.py --ranks 4 -- --model wrn-16-2 --conv gc2l --groups 4 --data sample

Fabric starts the ranks, or finds those of torchrun and srun; twolevel cuts the network and draws it; the loop is yours.
The strategy is ModelParallelStrategy with a function that cuts: DDP would copy the rows of rank 0 over those of other
groups, and average their gradients. The settings are those of `twolevel train`, and so are the losses, to the last bit
in float64 where --schedule and --kernels are given.
"""

import argparse
import os
import sys

import torch
from torch.nn import functional as F

try:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy
except ImportError as error:
    sys.exit(f"launch/fabric_train.py: {error}; pip install 'twolevel[fabric]'")

from twolevel import models
from twolevel.cli.train import configure
from twolevel.data import load, prepare
from twolevel.distributed import gather, init_mesh, parallelize
from twolevel.errors import UserError
from twolevel.nn import initialize
from twolevel.training.config import TrainConfig
from twolevel.training.optimiser import learning_rate, make_optimiser

# What this loop goes by, beside the settings of the network and the data; another value of any other is an error.
USED = (
    "recipe epochs update learning_rate lr_matrices lr_restriction lr_coarse lr_schedule lr_milestones lr_gamma "
    "warmup_epochs momentum momentum_restriction momentum_coarse weight_decay decay_norm device output max_steps "
    "log_steps seed precision"
).split()


def settings(words: list[str]) -> TrainConfig:
    config = configure(words)
    usual = TrainConfig(model=config.model, data=config.data).flat()
    for name, value in config.flat().items():
        if value != usual[name] and name not in USED:
            raise UserError(f"{name}={value}: this loop has no such thing; leave it out, or add it")
    if config.run.precision == "bf16" or config.model.conv in ("dgconv", "dgc", "lgc"):
        raise UserError("this loop is for float32 and float64, and convolutions without a rule of their own")
    return config


def cut(network: torch.nn.Module, _: object) -> torch.nn.Module:
    """This rank's rows of a network without memory, drawn: the same values for every number of ranks."""
    parallelize(network, mesh)
    return initialize(network, config.run.seed, device=fabric.device).to(dtype)


parser = argparse.ArgumentParser(usage="launch/fabric_train.py --ranks N -- SETTINGS of twolevel train...")
parser.add_argument("--ranks", type=int, default=1, help="on all machines; their number divides the groups")
parser.add_argument("--nodes", type=int, default=1, help="machines, each with as many ranks")
at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
own = parser.parse_args(sys.argv[1:at])
if own.nodes < 1 or own.ranks < 1 or own.ranks % own.nodes:
    parser.error(f"--ranks {own.ranks} does not divide over --nodes {own.nodes}")
try:
    config = settings(sys.argv[at + 1 :])
except UserError as error:
    print(f"launch/fabric_train.py: {error}", file=sys.stderr)
    sys.exit(2)
dtype = torch.float64 if config.run.precision == "float64" else torch.float32

device = "cpu" if config.mesh.device == "cpu" else "auto"
strategy = ModelParallelStrategy(cut, data_parallel_size=1, tensor_parallel_size=own.ranks)
fabric = Fabric(accelerator=device, strategy=strategy, devices=own.ranks // own.nodes, num_nodes=own.nodes)
fabric.launch()
here = {"RANK": fabric.global_rank, "LOCAL_WORLD_SIZE": own.ranks // own.nodes}  # Fabric sets the others
os.environ.update({name: str(value) for name, value in here.items()})
mesh = init_mesh(device=fabric.device.type)  # of the process group that Fabric has made
if fabric.local_rank == 0:
    prepare(config.data)
fabric.barrier()
data = load(config.data, seed=config.run.seed, device=fabric.device, dtype=dtype)
with torch.device("meta"):  # so that no rank ever holds the whole network
    whole = models.create(**config.model.create_options(data.num_classes))
network = fabric.setup_module(whole)
optimiser = fabric.setup_optimizers(make_optimiser(network.module, config.optimiser))
each = data.train.steps_per_epoch
for step in range(config.run.max_steps or config.epochs * each):
    if step % each == 0:
        batches = data.train.batches(step // each)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.optimiser, step, each) * group["scale"]
    images, labels = next(batches)
    loss = F.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
    optimiser.zero_grad()
    fabric.backward(loss)
    optimiser.step()
    fabric.print(f"step {step + 1}: loss {loss.item()}")
whole = gather(network.module, mesh, rank=0)  # the network of one process, on rank 0
if whole is not None:
    config.output.mkdir(parents=True, exist_ok=True)
    torch.save(whole.state_dict(), config.output / "network.pt")
