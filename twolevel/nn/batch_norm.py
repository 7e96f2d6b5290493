"""Batch norm followed by ReLU, as networks call it with modules of their own; and over the images of several ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.ops.kernels.normalise import Running
from twolevel.ops.normalise import Replicas, batch_norm
from twolevel.ops.normalise_dispatch import SETS, normaliser_for
from twolevel.ops.normalise_problem import NormaliseProblem
from twolevel.ops.problem import PLAIN
from twolevel.ops.ranges import normaliser_in_ranges
from twolevel.ops.tape import TapedReplicas, current


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all ranks' images: x `[B, C, H, W]`.

    (torch.nn.SyncBatchNorm does the same on GPUs and refuses CPUs.) One all-gather forward and one
    all-reduce backward, of 2 C + 1 and 2 C numbers; neither with one rank. Second derivatives across ranks are refused.
    """

    axis: Replicas

    def forward(self, x: Tensor) -> Tensor:
        _tell_watch(self, x, relu=False)
        done = _normalise(self, x, relu=False) if self.training and self.axis.ranks > 1 else None
        return super().forward(x) if done is None else done[0]


def batch_norm_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """ReLU(norm(x)): in training in fewer passes over memory, with nothing stored for backward but x.

    Parameters, statistics and gradients are to rounding those of F.relu(norm(x)), which it is wherever the norm has
    hooks, does not take the statistics of the batch or is of a class that is not known here, and in graphs.
    """
    return batch_norm_relu_and_input(norm, x)[0]


def batch_norm_relu_and_input(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """`batch_norm_relu`, and x for whatever else reads it: the gradients of the two are then added in one pass."""
    in_place = True
    if not torch.compiler.is_compiling() and type(x) in PLAIN and x.dim() == 4:
        _tell_watch(norm, x, relu=True)
        in_place = not _has_hooks(norm)  # they may keep what they see
        if in_place and _takes_batch(norm, x):
            done = _normalise(norm, x, relu=True)
            if done is not None:
                return done
    return F.relu(norm(x), inplace=in_place), x


def _has_hooks(norm: nn.BatchNorm2d) -> bool:
    own = vars(norm)  # torch has no other way to ask
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def _takes_batch(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether all that calling the module does is to normalise by this batch, without an error."""
    return (
        type(norm) in (nn.BatchNorm2d, SyncedBatchNorm2d)
        and norm.training
        and "forward" not in vars(norm)
        and x.shape[1] == norm.num_features
        and x.numel() > x.shape[1]  # torch refuses one number a channel
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] it is documented
        and _have_memory(x, norm.weight, norm.bias)
    )


def _have_memory(*tensors: Tensor | None) -> bool:
    """Whether these are not what torch.func puts in the place of tensors, which looks like them."""
    try:
        for tensor in tensors:
            if tensor is not None:
                tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _normalise(norm: nn.BatchNorm2d, x: Tensor, *, relu: bool) -> tuple[Tensor, Tensor] | None:
    """o, and x again; None where torch's own operations are to compute them on one rank."""
    weight, bias, replicas = norm.weight, norm.bias, _replicas_of(norm)
    if torch.compiler.is_compiling():
        kernels = SETS["torch"]
    else:
        kernels = normaliser_for(
            x,
            weight,
            bias,
            relu,
            1 if replicas is None else replicas.ranks,
            kernels_asked_for(norm),
            may_measure=torch.is_grad_enabled(),
        )
        kernels = normaliser_in_ranges(kernels)
    if replicas is None and kernels.name == "torch":
        return None
    return batch_norm(
        x,
        weight,
        bias,
        norm.eps,
        relu=relu,
        kernels=kernels,
        replicas=replicas,
        running=_running_of(norm),
    )


def _replicas_of(norm: nn.BatchNorm2d) -> Replicas | None:
    if not isinstance(norm, SyncedBatchNorm2d) or norm.axis.ranks == 1:
        return None
    tape = None if torch.compiler.is_compiling() else current()
    return norm.axis if tape is None else TapedReplicas(norm.axis, tape)


def kernels_asked_for(norm: nn.BatchNorm2d) -> str:
    """Its attribute `kernels`, where that has been set."""
    return vars(norm).get("kernels", "auto")


def _running_of(norm: nn.BatchNorm2d) -> Running | None:
    """What follows the batch, which is counted, as in nn.BatchNorm2d."""
    if not norm.track_running_stats:
        return None
    rate, batches = norm.momentum, norm.num_batches_tracked
    if batches is not None:
        batches.add_(1)
        if rate is None:  # the mean over all batches so far, without waiting for the device
            rate = 1 / batches.double()
    return None if rate is None else Running(norm.running_mean, norm.running_var, rate)


Watch = Callable[[nn.BatchNorm2d, NormaliseProblem], None]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched_norms(watch: Watch) -> Iterator[None]:
    """Inside, `watch` is called before every norm that chooses its kernels, with its problem in training.

    By the norm's attribute `kernels` it can be told which.
    """
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def _tell_watch(norm: nn.BatchNorm2d, x: Tensor, *, relu: bool) -> None:
    watch = _watch.get()
    if watch is not None:
        replicas = _replicas_of(norm)
        ranks = 1 if replicas is None else replicas.ranks
        watch(norm, NormaliseProblem.of(x, norm.weight, norm.bias, relu, ranks))
