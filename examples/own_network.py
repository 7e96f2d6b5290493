"""Train a network of your own, its channel groups shared over ranks.

torchrun --standalone --nproc-per-node 4 examples/own_network.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from twolevel.data import DataConfig, load
from twolevel.distributed import gather, init_mesh, parallelize
from twolevel.nn import TwoLevelConv2d, initialize


def block(n: int, m: int) -> list[nn.Module]:
    return [TwoLevelConv2d(n, m, 3, 2, 1, groups=4), nn.BatchNorm2d(m), nn.ReLU()]


mesh = init_mesh()  # of the ranks that torchrun started; alone, of this process
with torch.device("meta"):  # so that no rank ever holds the whole network
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *block(64, 128), *block(128, 256), *head)
parallelize(network, mesh)  # keep the rows of this rank's groups,
initialize(network, seed=0, device=mesh.device_type)  # and draw them: the same for every number of ranks
optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
data = load(DataConfig(data="sample", batch_size=100), seed=0, device=mesh.device_type)
for epoch in range(5):
    for images, labels in data.train.batches(epoch):
        loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if mesh.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
whole = gather(network, mesh, device=mesh.device_type, rank=0)  # the network of one process, on rank 0
if whole is not None:
    right = [whole.eval()(x).argmax(1) == y for x, y in data.test.eval_batches(100)]
    print(f"accuracy {torch.cat(right).float().mean():.1%}")
    torch.save(whole.state_dict(), "network.pt")
