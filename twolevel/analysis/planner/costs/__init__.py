"""What a training step costs by each way to share a network, a file each.

    group     cut by channel group over the inner axis, replicas over the data axis (GC-2L, GC); without a cut, DDP
    fsdp      as DDP, with parameters, gradients and momentum sharded; gathered block by block
    channel   every rank computes m/P filters of the dense convolution on all input channels, which are gathered
    pipeline  layers in stages: naive, gpipe, 1f1b

The formulas are in COST_MODEL.md.
"""
