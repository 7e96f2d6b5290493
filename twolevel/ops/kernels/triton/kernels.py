"""The two kernels behind the three operations. Importing this file needs Triton; nothing else in the package does.

    gather_product   forward and the input gradient: out[row, column] = sum over taps and channels of x times weight
    tap_product      the weight gradient: for each tap, the sum over pixels of gy times x

Channels of PACK consecutive groups lie side by side in channels_last memory, so a tile of PACK groups is a plain tile
of an input; only the weight's tile is block-diagonal, by a mask, and what the mask leaves out is never read.
Offsets are 32-bit: the callers refuse tensors of 2^31 elements.
"""

import triton
import triton.language as tl

# Decided when the kernels are decorated: TRITON_INTERPRET changed afterwards has no effect on them.
INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue] it is imported lazily


@triton.jit
def gather_product(
    x,  # [B, x_height, x_width, x_channels]
    w,  # weight, read as w[group * w_group + column * w_column + channel * w_channel + tap * w_tap]
    out,  # [B, out_height, out_width, out_channels]
    r,  # HAS_R: [groups, C, taps], the restriction
    z_out,  # HAS_R: [groups, num_rows]
    coarse,  # HAS_COARSE: [out_channels, num_maps]
    z_in,  # HAS_COARSE: [num_maps, num_rows]
    num_rows,  # B * row_height * row_width
    row_height,
    row_width,
    x_height,
    x_width,
    x_channels,
    out_height,
    out_width,
    out_channels,
    num_groups,
    # A row at (i, j) reads x at (i * x_scale + x_start + t * x_step) for its t-th tap ...
    x_scale_h,
    x_scale_w,
    x_start_h,
    x_start_w,
    x_step_h,
    x_step_w,
    # ... whose place in the weight is tap_start + t * tap_step ...
    tap_start_h,
    tap_start_w,
    tap_step_h,
    tap_step_w,
    # ... and is written to out at (i * out_scale + out_start).
    out_scale_h,
    out_scale_w,
    out_start_h,
    out_start_w,
    w_group,
    w_column,
    w_channel,
    w_tap,
    r_group,
    r_channel,
    r_tap,
    num_maps,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    KERNEL_W: tl.constexpr,
    C: tl.constexpr,  # channels of x in a group
    D: tl.constexpr,  # channels of out in a group
    PACK: tl.constexpr,
    HAS_R: tl.constexpr,
    HAS_COARSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = PACK * D
    ALL_COLUMNS: tl.constexpr = COLUMNS + PACK * HAS_R
    COLUMN_TILES: tl.constexpr = (ALL_COLUMNS + BLOCK_COLUMN - 1) // BLOCK_COLUMN
    CHUNKS: tl.constexpr = (PACK * C + BLOCK_K - 1) // BLOCK_K

    # Tiles of the same pixels run next to each other: in channels_last memory they share cache lines.
    program = tl.program_id(0)
    tiles = tl.cdiv(num_groups, PACK) * COLUMN_TILES
    first_group = program % tiles // COLUMN_TILES * PACK
    column = program % COLUMN_TILES * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    row = program // tiles * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    row_ok = row < num_rows
    j = row % row_width
    i = row // row_width % row_height
    image = row // (row_width * row_height)

    # Columns: PACK * D channels of out, then one representative for each of the PACK groups.
    if PACK == 1:
        own = tl.zeros_like(column)
        inner = column
    else:
        own = column // D
        inner = column % D
    column_ok = (column < COLUMNS) & (first_group + own < num_groups)
    w_at = w + (first_group + own) * w_group + inner * w_column
    if HAS_R:
        own = tl.where(column < COLUMNS, own, column - COLUMNS)
        z_ok = (column >= COLUMNS) & (column < ALL_COLUMNS) & (first_group + own < num_groups)
        r_at = r + (first_group + own) * r_group

    accumulator = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    # One flat loop, since only innermost loops are pipelined.
    for step in range(TAPS_H * TAPS_W * CHUNKS):
        t_h = step // CHUNKS // TAPS_W
        t_w = step // CHUNKS % TAPS_W
        tap = (tap_start_h + t_h * tap_step_h) * KERNEL_W + tap_start_w + t_w * tap_step_w
        x_i = i * x_scale_h + x_start_h + t_h * x_step_h
        x_j = j * x_scale_w + x_start_w + t_w * x_step_w
        inside = row_ok & (x_i >= 0) & (x_i < x_height) & (x_j >= 0) & (x_j < x_width)
        channel = step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)  # pyright: ignore[reportOperatorIssue] constexpr
        channel_ok = (channel < PACK * C) & (first_group * C + channel < x_channels)
        x_at = ((image * x_height + x_i) * x_width + x_j)[:, None] * x_channels + first_group * C
        pixels = tl.load(x + x_at + channel[None, :], mask=inside[:, None] & channel_ok[None, :], other=0.0)

        if PACK == 1:
            depth = channel
            meet = channel_ok[:, None]
        else:
            depth = channel % C
            meet = channel_ok[:, None] & ((channel // C)[:, None] == own[None, :])
        w_offset = depth[:, None] * w_channel + tap * w_tap
        weights = tl.load(w_at[None, :] + w_offset, mask=meet & column_ok[None, :], other=0.0)
        if HAS_R:  # no column is in both masks, so the sum is exact
            r_offset = depth[:, None] * r_channel + tap * r_tap
            weights += tl.load(r_at[None, :] + r_offset, mask=meet & z_ok[None, :], other=0.0)
        accumulator = tl.dot(pixels, weights, accumulator, input_precision=PRECISION)

    out_channel = first_group * D + column
    if HAS_COARSE:
        for first_map in range(0, num_maps, 16):
            maps = first_map + tl.arange(0, 16)
            map_ok = maps < num_maps
            z_at = z_in + maps[None, :] * num_rows + row[:, None]
            z = tl.load(z_at, mask=row_ok[:, None] & map_ok[None, :], other=0.0)
            coarse_at = coarse + out_channel[None, :] * num_maps + maps[:, None]
            terms = tl.load(coarse_at, mask=map_ok[:, None] & column_ok[None, :], other=0.0)
            accumulator = tl.dot(z, terms, accumulator, input_precision=PRECISION)

    result = accumulator.to(out.dtype.element_ty)
    out_i = i * out_scale_h + out_start_h
    out_j = j * out_scale_w + out_start_w
    out_at = ((image * out_height + out_i) * out_width + out_j)[:, None] * out_channels + out_channel[None, :]
    tl.store(out + out_at, result, mask=row_ok[:, None] & column_ok[None, :])
    if HAS_R:
        z_at = z_out + (first_group + own)[None, :] * num_rows + row[:, None]
        tl.store(z_at, result, mask=row_ok[:, None] & z_ok[None, :])


@triton.jit
def tap_product(
    x,  # [B, x_height, x_width, x_channels]
    gy,  # [B, height, width, gy_channels]
    partials,  # float32 [splits, gy_channels, taps, C]
    num_pixels,  # B * height * width
    height,
    width,
    gy_channels,
    x_height,
    x_width,
    x_channels,
    num_groups,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    pixels_per_split,  # a multiple of BLOCK_PIXELS
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    C: tl.constexpr,  # channels of x in a group
    D: tl.constexpr,  # channels of gy in a group
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    OUT_TILES: tl.constexpr = (PACK * D + BLOCK_OUT - 1) // BLOCK_OUT
    IN_TILES: tl.constexpr = (PACK * C + BLOCK_IN - 1) // BLOCK_IN

    # Taps vary before splits, so that programs that read the same pixels run together.
    program = tl.program_id(0)
    tiles = tl.cdiv(num_groups, PACK) * OUT_TILES * IN_TILES
    split = program // (tiles * TAPS)
    tap = program // tiles % TAPS
    first_group = program % tiles // (OUT_TILES * IN_TILES) * PACK
    out = program // IN_TILES % OUT_TILES * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    channel = program % IN_TILES * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out_ok = (out < PACK * D) & (first_group * D + out < gy_channels)
    channel_ok = (channel < PACK * C) & (first_group * C + channel < x_channels)
    shift_h = tap // KERNEL_W * dilation_h - padding_h
    shift_w = tap % KERNEL_W * dilation_w - padding_w

    accumulator = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, pixels_per_split, BLOCK_PIXELS):
        pixel = split * pixels_per_split + start + tl.arange(0, BLOCK_PIXELS)
        pixel_ok = pixel < num_pixels
        x_i = pixel // width % height * stride_h + shift_h
        x_j = pixel % width * stride_w + shift_w
        inside = pixel_ok & (x_i >= 0) & (x_i < x_height) & (x_j >= 0) & (x_j < x_width)
        image = pixel // (width * height)
        gy_at = gy + pixel[:, None] * gy_channels + first_group * D + out[None, :]
        gradients = tl.load(gy_at, mask=pixel_ok[:, None] & out_ok[None, :], other=0.0)
        x_at = ((image * x_height + x_i) * x_width + x_j)[:, None] * x_channels + first_group * C
        values = tl.load(x + x_at + channel[None, :], mask=inside[:, None] & channel_ok[None, :], other=0.0)
        accumulator = tl.dot(tl.trans(gradients), values, accumulator, input_precision=PRECISION)

    place = (split * gy_channels + first_group * D + out) * TAPS + tap
    keep = out_ok[:, None] & channel_ok[None, :]
    if PACK == 1:
        depth = channel
    else:
        depth = channel % C
        keep = keep & ((out // D)[:, None] == (channel // C)[None, :])
    tl.store(partials + place[:, None] * C + depth[None, :], accumulator, mask=keep)
