"""How long inference takes, as a share of dense networks': `python -m benchmarks inference`.

command.py    the command line, and the file of results
peers.py      layers in the form of each peer, as training would leave them
layers.py     the convolutions of a ResNet-18, every kind of group convolution
networks.py   whole networks as they are and prepared by `for_inference`: condensenet-86, dense and of DGC
"""


def main(argv: list[str]) -> None:
    from benchmarks.inference import command

    command.main(argv)
