"""Channel parallelism: the exact dense convolution, its filters split over ranks, at its full price of communication.

Rank p of P holds m/P filters of every convolution and computes on the n/P channels of x that it holds:

                  rank p                                         the link
    forward   start gather of x_p [B, n/P, H, W]  ------------>  x = [x_1 ... x_P]
              y_p = W_p * x   (of every convolution that reads x)

    backward  gx = W_p^T * gy_p, summed over these convolutions
              start scatter  --------------------------------->  gx_p = sum over ranks of gx[p]
              gW_p from gy_p and x                                   |
              wait  <------------------------------------------------+

An activation is gathered once, however many convolutions read it (a block's first convolution and its shortcut). The
gathered x is kept for backward, so that activations take nearly the memory of the whole network. Normalisation,
activation and pooling treat every channel alone and stay local; stem and classifier are split as by `parallelize`.
"""

import torch
from torch import Tensor, fx, nn
from torch.distributed import DeviceMesh
from torch.nn import functional as F

from twolevel.distributed.collectives import MeshAxis, refuse_second_derivative
from twolevel.distributed.layers import SplitClassifier, SplitStem
from twolevel.distributed.layerwise import draw, read_graph, synchronise_batch_norm
from twolevel.distributed.mpi_axis import exchange_of
from twolevel.distributed.within_groups import PER_CHANNEL, is_per_channel
from twolevel.errors import UserError
from twolevel.nn import layout_of
from twolevel.nn.arguments import check_divides
from twolevel.nn.layout import Layout, channel_dims
from twolevel.nn.structure import ends
from twolevel.ops.autocast import cast_for_convolution
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.restriction import conv_backward


def split_channels(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    sync_batch_norm: bool = False,
    exchange: str = "auto",
    timeout_s: float = 600,
) -> nn.Module:
    """Keep of `model`, in place, the filters of this rank of the mesh's `group` axis; sets `model.layout`.

    For networks of dense and depthwise convolutions (or group convolutions whose groups the ranks divide) and what
    treats every channel alone, ending in a linear classifier. With `device`, the network is one of the meta device
    and is drawn here from `seed`, layer by layer, with the values of the whole network; `twolevel.nn.initialize`
    must not be called afterwards. `exchange` and `timeout_s` are as in `parallelize`. Every rank must call this.

    Raises UserError, on every rank and before anything is changed, where a module or operation acts across
    channels, or ranks do not divide channels; or as in `exchange_of`.
    """
    whole = layout_of(model)
    if whole.parts > 1:
        raise UserError("this network is a part already; split a whole one")
    ranks = mesh["group"].size()
    readers = _readers(model, ranks) if ranks > 1 else []
    axis = exchange_of(mesh, exchange, timeout_s) if ranks > 1 else None
    stem, classifier = ends(model)
    layout = Layout(whole.groups, channel_dims(model)).part(mesh.get_local_rank("group"), ranks)
    for name, module in [*model.named_modules()]:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if device is not None and own:
            draw(module, name, whole, seed, device)
        if axis is not None:
            _cut(module, layout.within(name), axis, module is stem, module is classifier)
    for together in readers:
        _gather_once(together, axis)
    model.layout = layout if ranks > 1 else whole
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    return model


class GatheringConv2d(nn.Conv2d):
    """A dense convolution whose filters are split: x `[B, n/P, H, W]` -> y `[B, m/P, H', W']`, weight `[m/P, n, k, k]`.

    The first of those that read one activation computes for all of them (`together`, itself the first); the others
    give back what it computed for them.
    """

    axis: MeshAxis
    together: tuple["GatheringConv2d", ...] = ()
    computed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.together:
            outputs = gathered_convolutions(x, self.together, self.axis)
            for conv, y in zip(self.together, outputs, strict=True):
                conv.computed = y
        y, self.computed = self.computed, None
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


def gathered_convolutions(x: Tensor, convs: tuple[nn.Conv2d, ...], axis: MeshAxis) -> tuple[Tensor, ...]:
    """W_p * x of each convolution, for x `[B, n/P, H, W]` gathered once."""
    # Before x crosses: half the bytes.
    x, *weights = cast_for_convolution(x, *(conv.weight for conv in convs))
    geometries = [Geometry(conv.stride, conv.padding, conv.dilation) for conv in convs]
    return _GatheredConvolutions.apply(x, axis, geometries, *weights)


class _GatheredConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, geometries, *weights):
        whole = _join(axis.gather(_channels_inmost(x)).wait(), axis.ranks)
        ctx.save_for_backward(whole, *weights)
        ctx.axis, ctx.geometries = axis, geometries
        return tuple(F.conv2d(whole, w, None, *g) for w, g in zip(weights, geometries, strict=True))

    @staticmethod
    def backward(ctx, *gys):
        whole, *weights = ctx.saved_tensors
        need_x, _, _, *need_weights = ctx.needs_input_grad
        gathered = [*zip(gys, weights, ctx.geometries, need_weights, strict=True)]
        scattering = None
        if need_x:
            parts = [conv_backward(gy, whole, w, g, 1, (True, False))[0] for gy, w, g, _ in gathered]
            gx = sum(parts[1:], parts[0])
            refuse_second_derivative(gx)
            scattering = ctx.axis.scatter_sum(_part(gx, ctx.axis.ranks))
        g_weights = [
            conv_backward(gy, whole, w, g, 1, (False, True))[1] if need else None
            for gy, w, g, need in gathered
        ]
        gx = None if scattering is None else scattering.wait().permute(0, 3, 1, 2)
        return gx, None, None, *g_weights


def _channels_inmost(x: Tensor) -> Tensor:
    """`[B, c, H, W] -> [B, H, W, c]` contiguous: no copy of what is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _join(parts: Tensor, ranks: int) -> Tensor:
    """`[P B, H, W, c]`, the parts of all ranks, as x `[B, P c, H, W]` in channels_last memory."""
    return parts.unflatten(0, (ranks, -1)).permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _part(gx: Tensor, ranks: int) -> Tensor:
    """`[B, P c, H, W]` as `[P B, H, W, c]` contiguous: the inverse of `_join`."""
    return gx.permute(0, 2, 3, 1).unflatten(3, (ranks, -1)).permute(3, 0, 1, 2, 4).flatten(0, 1).contiguous()


def _cut(module: nn.Module, layout: Layout, axis: MeshAxis, is_stem: bool, is_classifier: bool) -> None:
    """Keep of one layer this rank's rows; its class changes only in how its input or output crosses ranks."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        part = layout.cut(name, tensor.detach()).clone()
        if isinstance(tensor, nn.Parameter):
            part = nn.Parameter(part, requires_grad=tensor.requires_grad)
        setattr(module, name, part)
    if is_classifier:
        module.__class__, module.axis = SplitClassifier, axis
        module.in_features //= axis.ranks
    elif isinstance(module, nn.Conv2d):
        module.out_channels //= axis.ranks
        if is_stem:
            module.__class__, module.axis = SplitStem, axis
        elif module.groups > 1:
            module.in_channels //= axis.ranks
            module.groups //= axis.ranks
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features //= axis.ranks


def _gather_once(convs: list[nn.Conv2d], axis: MeshAxis) -> None:
    for conv in convs:
        conv.__class__, conv.axis = GatheringConv2d, axis
    convs[0].together = tuple(convs)


def _readers(model: nn.Module, ranks: int) -> list[list[nn.Conv2d]]:
    """The dense convolutions behind the stem, those that read one activation together, in the order of the graph.

    Raises UserError, naming the module or operation, where the network cannot be split.
    """
    stem, classifier = ends(model)
    if stem is None or classifier is None:
        raise UserError(
            f"parallel=channel needs a dense first convolution and a linear classifier; {type(model).__name__} "
            "has not both; replicate it with --data-parallel"
        )
    readers: dict[fx.Node, list[nn.Conv2d]] = {}
    split: set[fx.Node] = set()  # what ranks hold channels of; everything else is whole on each
    for node in read_graph(model, "channel").nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        inputs = [source for source in node.all_input_nodes if source in split]
        if module is stem:
            check_divides("ranks", ranks, **{f"channels of {node.target}": stem.out_channels})
            split.add(node)
        elif not inputs:
            if isinstance(module, nn.Conv2d):
                raise _refuse(f"{node.target}, a second convolution of the image,")
            if isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0:
                raise _refuse(f"{node.target}, a dropout of what every rank holds,")
        elif module is classifier:
            check_divides("ranks", ranks, **{f"features of {node.target}": classifier.in_features})
        elif len(inputs) < len(node.all_input_nodes) or not _acts_by_channel(node, module, ranks):
            what = f"{node.target} ({type(module).__name__})" if module else f"the operation {node.name!r}"
            raise _refuse(what)
        else:
            split.add(node)
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                readers.setdefault(inputs[0], []).append(module)
    return [*readers.values()]


def _acts_by_channel(node: fx.Node, module: nn.Module | None, ranks: int) -> bool:
    """Whether each rank can compute its channels of the output; of a convolution also whether ranks divide them."""
    if module is None:
        return node.op != "output" and is_per_channel(node)
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return False
        check_divides("ranks", ranks, **{f"channels of {node.target}": module.out_channels})
        if module.groups > 1:
            check_divides("ranks", ranks, **{f"groups of {node.target}": module.groups})
        return True
    flattens = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    return flattens or isinstance(module, PER_CHANNEL)


def _refuse(what: str) -> UserError:
    return UserError(
        f"{what} is not known to act channel by channel and cannot be split by parallel=channel; "
        "replicate the network with --data-parallel"
    )
