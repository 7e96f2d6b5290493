"""Convert a dense network of torchvision to two-level convolutions and fine-tune it; compare with starting anew.

python examples/finetune.py [WEIGHTS]     a state_dict of resnet18 with 10 classes; trained here first without it
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import twolevel
from twolevel.data import Data, DataConfig, load


def train(network: nn.Module, data: Data, epochs: int, learning_rate: float) -> float:
    """SGD with one cycle of the learning rate; returns the test accuracy."""
    network.train()
    steps = epochs * data.train.steps_per_epoch
    optimiser = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, steps)
    for images, labels in batches(data, epochs):
        loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return accuracy(network, data)


def batches(data: Data, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(epochs):
        yield from data.train.batches(epoch)


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    network.eval()
    right = sum((network(x).argmax(1) == y).sum().item() for x, y in data.test.eval_batches(100))
    return right / len(data.test)


def dense(weights: str | None) -> nn.Module:
    network = resnet18(num_classes=10)
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def main(weights: str | None = None, epochs: int = 4) -> None:
    torch.manual_seed(0)
    data = load(DataConfig(data="sample", batch_size=50), seed=0, device="cpu")
    network = dense(weights)
    reached = accuracy(network, data) if weights else train(network, data, 2 * epochs, learning_rate=0.05)
    print(f"dense: accuracy {reached:.1%}")
    trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for nearest in (True, False):
        network = dense(None)
        network.load_state_dict(trained)
        twolevel.convert(network, "gc2l", groups=4, representatives=2, nearest=nearest)
        if nearest:
            print(network.conversion)
        before = accuracy(network, data)
        after = train(network, data, epochs, learning_rate=0.02)
        print(
            f"{'nearest weights' if nearest else 'drawn anew'}: accuracy {before:.1%}, fine-tuned {after:.1%}"
        )
        if nearest:
            torch.save(network.state_dict(), "finetuned.pt")
    # To read it back, convert a fresh network in the same way.
    again = twolevel.convert(dense(None), "gc2l", groups=4, representatives=2)
    again.load_state_dict(torch.load("finetuned.pt", weights_only=True))
    print(f"finetuned.pt: accuracy {accuracy(again, data):.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
