"""The kernels of batch normalisation. Importing this file or `kernels` needs Triton; nothing else does.

Maps are rows [N, C] of N = B P pixels (channels_last) or planes [B, C, P]. A program has a tile of pixels and channels,
for sums a split of the pixels, tile by tile. Numbers are float32 whatever the maps are. Offsets are 32-bit: the callers
refuse maps of 2^31 elements.
"""

import triton
import triton.language as tl

# Decided when the kernels are decorated: TRITON_INTERPRET changed afterwards has no effect on them.
INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue] it is imported lazily


@triton.jit
def tile_of(pixel, channel, num_pixels, channels, plane, IN_ROWS: tl.constexpr):
    """Where a tile is, and what of it there is."""
    there = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    if IN_ROWS:
        at = pixel[:, None] * channels + channel[None, :]
    else:
        at = (pixel // plane * channels * plane + pixel % plane)[:, None] + channel[None, :] * plane
    return at, there


@triton.jit
def first_number(x, channel, channels, plane, IN_ROWS: tl.constexpr):
    """Of each channel; differences from it have as many digits as there are, wherever the mean is."""
    at = channel if IN_ROWS else channel * plane
    return tl.load(x + at, mask=channel < channels, other=0.0).to(tl.float32)


@triton.jit
def numbers_of(
    channel, channels, mean, inv_std, weight, bias, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """mean, 1 / std, weight / std and bias of the channels of a tile."""
    ok = channel < channels
    means = tl.load(mean + channel, mask=ok, other=0.0)[None, :]
    inverse = tl.load(inv_std + channel, mask=ok, other=0.0)[None, :]
    scale = inverse
    shift = tl.zeros_like(inverse)
    if HAS_WEIGHT:
        scale = inverse * tl.load(weight + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    return means, inverse, scale, shift


@triton.jit
def moments_of_splits(
    x,
    means,  # [splits, C], less the channel's first number
    spreads,  # [splits, C], sums of (x - mean)^2
    num_pixels,
    channels,
    plane,
    tiles,  # of a split
    IN_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    split = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    shift = first_number(x, channel, channels, plane, IN_ROWS)[None, :]
    mean = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    spread = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for tile in range(tiles):
        first = (split * tiles + tile) * BLOCK_PIXELS
        pixel = first + tl.arange(0, BLOCK_PIXELS)
        at, there = tile_of(pixel, channel, num_pixels, channels, plane, IN_ROWS)
        values = tl.where(there, tl.load(x + at, mask=there, other=0.0).to(tl.float32) - shift, 0.0)
        # Of the tile, about its own mean; then joined to those before it (Chan, Golub, LeVeque, 1979).
        number = tl.maximum(tl.minimum(num_pixels - first, BLOCK_PIXELS), 0).to(tl.float32)
        own = tl.sum(values, 0) / tl.maximum(number, 1.0)
        off = tl.where(there, values - own[None, :], 0.0)
        part = number / tl.maximum(tile * BLOCK_PIXELS + number, 1.0)
        apart = own - mean
        spread += tl.sum(off * off, 0) + apart * apart * (tile * BLOCK_PIXELS) * part
        mean += apart * part
    place = split * channels + channel
    tl.store(means + place, mean, mask=channel < channels)
    tl.store(spreads + place, spread, mask=channel < channels)


@triton.jit
def join_moments(
    x,
    means,  # [splits, C]
    spreads,
    found,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    running_mean,
    running_var,
    eps,
    rate,
    num_pixels,
    pixels_per_split,
    splits,
    channels,
    plane,
    IN_ROWS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    split = tl.arange(0, BLOCK_SPLITS)
    ok = channel < channels
    there = (split < splits)[:, None] & ok[None, :]
    at = split[:, None] * channels + channel[None, :]
    number = tl.minimum(tl.maximum(num_pixels - split * pixels_per_split, 0), pixels_per_split).to(tl.float32)
    share = (number / num_pixels)[:, None]
    own = tl.load(means + at, mask=there, other=0.0)
    shifted = tl.sum(own * share, 0)
    apart = tl.where(there, own - shifted[None, :], 0.0)  # pyright: ignore[reportArgumentType] a tensor
    spread = tl.sum(tl.load(spreads + at, mask=there, other=0.0) + apart * apart * number[:, None], 0)
    mean = shifted + first_number(x, channel, channels, plane, IN_ROWS)
    var = spread / num_pixels
    tl.store(found + channel, mean, mask=ok)
    tl.store(found + channels + channel, var, mask=ok)
    tl.store(found + 2 * channels + channel, 1.0 / tl.sqrt_rn(var + eps), mask=ok)
    if HAS_MEAN:
        before = tl.load(running_mean + channel, mask=ok, other=0.0)
        tl.store(running_mean + channel, before + rate * (mean - before), mask=ok)
    if HAS_VAR:
        before = tl.load(running_var + channel, mask=ok, other=0.0)
        tl.store(running_var + channel, before + rate * (spread / (num_pixels - 1) - before), mask=ok)


@triton.jit
def apply(
    x,
    o,
    mean,
    inv_std,
    weight,
    bias,
    num_pixels,
    channels,
    plane,
    IN_ROWS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    at, there = tile_of(pixel, channel, num_pixels, channels, plane, IN_ROWS)
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    means, _, scale, shift = numbers_of(channel, channels, mean, inv_std, weight, bias, HAS_WEIGHT, HAS_BIAS)
    v = (values - means) * scale + shift
    if RELU:
        v = tl.where(v < 0, 0.0, v)  # NaN stays
    tl.store(o + at, v.to(o.dtype.element_ty), mask=there)


@triton.jit
def sums_of_splits(
    go,
    x,
    sums,  # [splits, 2, C]
    mean,
    inv_std,
    weight,
    bias,
    num_pixels,
    channels,
    plane,
    tiles,  # of a split
    IN_ROWS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    split = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    means, inverse, scale, shift = numbers_of(
        channel, channels, mean, inv_std, weight, bias, HAS_WEIGHT, HAS_BIAS
    )
    s = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    t = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for tile in range(tiles):
        pixel = (split * tiles + tile) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        at, there = tile_of(pixel, channel, num_pixels, channels, plane, IN_ROWS)
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(go + at, mask=there, other=0.0).to(tl.float32)
        off = values - means
        if RELU:
            g = tl.where(off * scale + shift <= 0, 0.0, g)
        s += tl.sum(g, 0)
        t += tl.sum(tl.where(there, g * off * inverse, 0.0), 0)
    place = split * 2 * channels + channel
    tl.store(sums + place, s, mask=channel < channels)
    tl.store(sums + channels + place, t, mask=channel < channels)


@triton.jit
def input_grad(
    go,
    x,
    more,
    gx,
    sums,  # [2, C]
    part,  # makes means of them
    mean,
    inv_std,
    weight,
    bias,
    num_pixels,
    channels,
    plane,
    IN_ROWS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MORE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    at, there = tile_of(pixel, channel, num_pixels, channels, plane, IN_ROWS)
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(go + at, mask=there, other=0.0).to(tl.float32)
    means, inverse, scale, shift = numbers_of(
        channel, channels, mean, inv_std, weight, bias, HAS_WEIGHT, HAS_BIAS
    )
    off = values - means
    if RELU:
        g = tl.where(off * scale + shift <= 0, 0.0, g)
    s = tl.load(sums + channel, mask=channel < channels, other=0.0) * part
    t = tl.load(sums + channels + channel, mask=channel < channels, other=0.0) * part
    found = (g - s[None, :] - off * inverse * t[None, :]) * scale
    if HAS_MORE:
        found += tl.load(more + at, mask=there, other=0.0).to(tl.float32)
    tl.store(gx + at, found.to(gx.dtype.element_ty), mask=there)
