"""`python -m benchmarks`: all that this machine can run, or one benchmark by name."""

import importlib
import sys

BENCHMARKS = {
    "dispatch": "what a two-level layer costs the host above its kernels",
    "inference": "in inference, on the CPU: every kind of group convolution, and a network of dynamic ones",
    "export": "whole networks in inference, on the CPU: eager, prepared, as a program of torch, in onnxruntime",
    "kernels": "what Triton kernels compile to for cards that need not be there: registers, loads, instructions",
    "layers": "every distinct convolution of a network, forward and its gradients, against the roofline",
    "traffic": "how often a layer passes over its maps, kernel by kernel; nothing is timed",
    "normalise": "batch norm and ReLU of every size in a network, forward and backward, by torch and by ours",
    "step": "whole training steps: dense, group, our and stock two-level convolutions",
    "recompute": "memory and time of steps whose blocks are computed again in backward",
    "finetune": "error of networks that start from the weights nearest to a dense one's, against anew; hours",
    "input": "training steps fed by the input pipeline against steps on a batch that is there",
    "predict": "the cost model of `twolevel plan`, calibrated here, against measured steps",
    "scaling": "GC-2L and its rivals over ranks, over emulated links, and projected to many ranks",
    "faults": "runs whose ranks are killed, stopped or cut off at random moments, and what comes of them",
    "gpu": "a GPU's first hour: parity, tuning, whole steps, profiles, rooflines, NCCL; goes on where it stopped",
}
HELP = """usage: python -m benchmarks [NAME [OPTIONS]]

Without a name: all of them with their defaults, on the CPU and on a GPU where there is one; about half an hour.
Some ranks of your own, under mpirun or torchrun: python -m benchmarks.exchange
Not among them: gpu, a GPU's first hour, and faults and finetune, some hours each.

{names}

python -m benchmarks NAME --help shows the options of one. Results go to benchmarks/results/."""
ON_A_GPU = ("layers", "normalise", "step", "input", "scaling")
ALONE = ("gpu", "faults", "finetune")  # of their own length


def run_one(name: str, argv: list[str]) -> None:
    importlib.import_module(f"benchmarks.{name}").main(argv)


def run_all() -> None:
    """Every benchmark on the CPU, then on a GPU those that have something to do there; says what it skips."""
    runs = [
        (name, ["--device", "cpu"] if name in ON_A_GPU else []) for name in BENCHMARKS if name not in ALONE
    ]

    import torch

    from benchmarks.report import no_gpu

    skipped = {}
    for name in ON_A_GPU:
        if torch.cuda.is_available():
            runs.append((name, ["--device", "cuda"]))
        else:
            skipped[f"{name} on a GPU"] = no_gpu()
    for name, argv in runs:
        print(f"\n{' '.join([name, *argv])}: {BENCHMARKS[name]}", flush=True)
        run_one(name, argv)
    for what, why in skipped.items():
        print(f"skipped {what}: {why}")


def main(argv: list[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print(HELP.format(names="\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())))
        return

    from twolevel.errors import (
        UserError,
        unknown,
    )  # a light import: no torch before it is known what is wanted

    try:
        if not argv:
            run_all()
        elif argv[0] in BENCHMARKS:
            run_one(argv[0], argv[1:])
        else:
            raise unknown("benchmark", argv[0], BENCHMARKS)
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
