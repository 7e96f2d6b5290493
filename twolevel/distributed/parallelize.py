"""The one place that cuts a network: by channel group over the `group` axis, whole over the `data` axis."""

from functools import partial

from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.layers import SplitClassifier, SplitStem
from twolevel.distributed.layerwise import synchronise_batch_norm
from twolevel.distributed.mpi_axis import exchange_of
from twolevel.distributed.within_groups import check_within_groups
from twolevel.errors import UserError
from twolevel.nn import Layout, TwoLevelConv2d, layout_of
from twolevel.nn.arguments import check_groups
from twolevel.nn.structure import ends


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sync_batch_norm: bool = False,
    exchange: str = "auto",
    timeout_s: float = 600,
) -> nn.Module:
    """Keep of `model`, in place, the rows of this rank's groups; sets `model.layout`.

    Works on a materialised model and on one of the meta device, whose parts are then drawn by
    `twolevel.nn.initialize(model, seed, device)`: no rank ever builds the whole.

    In order: (1) convolutions, normalisations, stem and classifier are cut by channel group;
    (2) two-level convolutions get the exchange of this `group` axis; (3) with `sync_batch_norm`, batch
    statistics are taken over the `data` axis (over the group axis there is nothing to share: a channel
    lives on one rank). `replicate` then adds the gradients' all-reduce over `data`.

    `exchange` is what carries (2): "group", the process group of the axis; "mpi", within `timeout_s` a collective;
    or "auto", MPI for ranks on CPUs that it started. Every rank of the mesh must call this.

    Raises UserError where the axis does not divide the groups, a module acts across groups, or as in `exchange_of`.
    """
    layout = layout_of(model)
    if layout.parts > 1:
        raise UserError("this network is a part already; parallelize a whole one")
    ranks = mesh["group"].size()
    if ranks > 1:
        _check(model, layout, ranks)
        layout = layout.part(mesh.get_local_rank("group"), ranks)
        _cut(model, layout, exchange_of(mesh, exchange, timeout_s))
    model.layout = layout
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    return model


def replicate(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Average gradients over the `data` axis with DistributedDataParallel; nothing where it has one rank.

    Batch norm is local to a rank, as by default in DDP, unless `parallelize` synchronised it.
    """
    if mesh["data"].size() == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_in_strides, parameter.stride()))
    return DistributedDataParallel(model, process_group=mesh.get_group("data"), gradient_as_bucket_view=True)


def _in_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient in its parameter's strides where they differ in sizes of 1 alone, as a view.

    Autograd takes such gradients as they are (others it copies), and DDP, whose buckets have the strides of
    parameters, then warns. Most are of 1 x 1 kernels, which channels_last and contiguous memory stride differently.
    """
    sizes = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if any(size != 1 and own != other for size, own, other in sizes):
        return gradient
    return gradient.as_strided(gradient.shape, strides)


def _check(model: nn.Module, layout: Layout, ranks: int) -> None:
    check_within_groups(model, ranks)
    groups = layout.groups
    if groups % ranks:
        fits = ", ".join(str(p) for p in range(1, groups + 1) if groups % p == 0)
        raise UserError(f"group={ranks} ranks do not divide groups={groups}; use one of {fits} ranks")
    stem, classifier = ends(model)
    if stem is not None:
        check_groups(groups, stem_channels=stem.out_channels)
    if classifier is not None:
        check_groups(groups, classifier_features=classifier.in_features)
    for name, module in model.named_modules():
        if isinstance(module, TwoLevelConv2d) and module.schedule == "dense":
            raise UserError(f"schedule='dense' needs every channel on one rank: {name} has {ranks}; use auto")


def _cut(model: nn.Module, layout: Layout, axis: MeshAxis) -> None:
    stem, classifier = ends(model)
    for prefix, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            part = layout.cut(key, tensor.detach()).clone()
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
            setattr(module, name, part)

        # Each class changes only in how its input or output crosses ranks; its tensors keep their names.
        if module is stem:
            module.__class__, module.axis = SplitStem, axis
            module.out_channels //= axis.ranks
        elif module is classifier:
            module.__class__, module.axis = SplitClassifier, axis
            module.in_features //= axis.ranks
        elif isinstance(module, TwoLevelConv2d):
            module.exchange = axis
        elif isinstance(module, nn.Conv2d):
            module.out_channels //= axis.ranks
            if module.groups > 1:  # the coarse convolution alone reads the representatives of all groups
                module.in_channels //= axis.ranks
                module.groups //= axis.ranks
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features //= axis.ranks
