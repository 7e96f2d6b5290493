"""What checkpoints and fingerprints cost a run: windows of steps with and without, in turns, in one process."""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from twolevel.training.checkpoint import Retention, Saver
from twolevel.training.config import TrainConfig
from twolevel.training.context import join
from twolevel.training.fingerprint import fingerprint
from twolevel.training.job import Job
from twolevel.training.loop import Trainer

WINDOW = 50  # steps, and a checkpoint in every second window
PAIRS = 12
FINGERPRINT_STEPS = 100
NETWORK = {"model": "wrn-16-4", "conv": "gc2l", "groups": 4}


def measure() -> dict[str, Any]:
    """Seconds of windows of steps without and with a checkpoint at their start, and of a fingerprint.

    The last window's checkpoint is waited for in its time. `saver_cpu_s` is what a checkpoint takes of a processor
    beside the training: where every core computes, that is what it costs.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict(
            {
                "model": NETWORK,
                "data": {"data": "sample", "batch_size": 32},
                "run": {"output": str(Path(folder, "run"))},
            }
        )
        context = join(config.mesh, config.flat())
        torch.set_num_threads(1)  # which `join` has set
        try:
            trainer = Trainer(config, context, None, Job.of(context.device), None, ())
            return _windows(trainer, Saver(Path(folder, "checkpoints"), Retention()))
        finally:
            context.close()


def _windows(trainer: Trainer, saver: Saver) -> dict[str, Any]:
    state = trainer.state
    state.model.train()
    batches = itertools.cycle([*itertools.islice(trainer.data.train.batches(0, 0), 8)])

    def window(save: bool) -> float:
        begin = time.perf_counter()
        if save:
            state.save(saver)
        for images, labels in itertools.islice(batches, WINDOW):
            trainer.train_step(images, labels)
            state.step += 1
        if save:
            saver.finish()
        return time.perf_counter() - begin

    window(True)
    without, having = [], []
    cpu = 0.0
    for _ in range(PAIRS):
        without.append(window(False))
        before, own = time.process_time(), time.thread_time()
        having.append(window(True))
        cpu += time.process_time() - before - (time.thread_time() - own)
    times = []
    for images, labels in itertools.islice(batches, 20):
        begin = time.perf_counter()
        fingerprint(state.model, state.mesh, state.step, (images, labels), shared=True)
        times.append(time.perf_counter() - begin)
    step = statistics.median(without) / WINDOW
    ratios = [b / a for a, b in zip(without, having, strict=True)]
    return {
        "network": NETWORK,
        "step_s": step,
        "window_steps": WINDOW,
        "windows_without_s": without,
        "windows_with_s": having,
        "checkpoint_every_50_steps": statistics.median(ratios) - 1,
        "saver_cpu_s": cpu / PAIRS,
        "saver_cpu_of_window": cpu / PAIRS / statistics.median(without),
        "fingerprint_s": statistics.median(times),
        "fingerprint_every_100_steps": statistics.median(times) / (FINGERPRINT_STEPS * step),
    }
