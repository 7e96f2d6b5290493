"""The two kernels of the three operations. Importing this file or `normalise_kernels` needs Triton; nothing else does.

    gather_product   forward and the input gradient: out[row, column] = sum over taps and channels of x times weight
    tap_product      the weight gradient: for each tap and channel, the sum over pixels of gy times x

Taps and channels are one side of a product, k = tap * channels + channel: a tile of it may hold the end of one tap and
the beginning of the next, so only the end of the whole side is padded. Channels of PACK consecutive groups lie side by
side in channels_last memory, so a tile of PACK groups is a plain tile of an input; only the weight's tile is
block-diagonal, by a mask, and what the mask leaves out is never read.

All sizes but the number of images are constants: divisions become multiplications, and what is known to begin at
multiples of 16 bytes is copied 16 bytes at a time. Offsets are 32-bit: the callers refuse tensors of 2^31 elements.
"""

import triton
import triton.language as tl

# Decided when the kernels are decorated: TRITON_INTERPRET changed afterwards has no effect on them.
INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue] it is imported lazily


@triton.jit
def gather_product(
    x,  # [B, X_HEIGHT, X_WIDTH, X_CHANNELS]
    w,  # weight, read as w[group * W_GROUP + column * W_COLUMN + channel * W_CHANNEL + tap * W_TAP]
    out,  # [B, OUT_HEIGHT, OUT_WIDTH, OUT_CHANNELS]
    r,  # [NUM_GROUPS * OWN_MAPS, taps, C], the restriction
    z_out,  # [NUM_GROUPS * OWN_MAPS, num_rows]
    coarse,  # [OUT_CHANNELS, NUM_MAPS]
    z_in,  # [NUM_MAPS, num_rows]
    num_rows,  # B * ROW_HEIGHT * ROW_WIDTH
    ROW_HEIGHT: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    X_HEIGHT: tl.constexpr,
    X_WIDTH: tl.constexpr,
    X_CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    # A row at (i, j) reads x at (i * X_SCALE + X_START + t * X_STEP) for its t-th tap ...
    X_SCALE_H: tl.constexpr,
    X_SCALE_W: tl.constexpr,
    X_START_H: tl.constexpr,
    X_START_W: tl.constexpr,
    X_STEP_H: tl.constexpr,
    X_STEP_W: tl.constexpr,
    # ... whose place in the weight is TAP_START + t * TAP_STEP ...
    TAP_START_H: tl.constexpr,
    TAP_START_W: tl.constexpr,
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    # ... and is written to out at (i * OUT_SCALE + OUT_START).
    OUT_SCALE_H: tl.constexpr,
    OUT_SCALE_W: tl.constexpr,
    OUT_START_H: tl.constexpr,
    OUT_START_W: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_COLUMN: tl.constexpr,
    W_CHANNEL: tl.constexpr,
    W_TAP: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    KERNEL_W: tl.constexpr,
    C: tl.constexpr,  # channels of x in a group
    D: tl.constexpr,  # channels of out in a group
    PACK: tl.constexpr,
    OWN_MAPS: tl.constexpr,  # representatives of a group that are computed as well, perhaps none
    R_BYTES: tl.constexpr,  # rows of r and w begin at multiples of so many, at most 16
    NUM_MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMNS: tl.constexpr = PACK * D
    ALL_COLUMNS: tl.constexpr = COLUMNS + PACK * OWN_MAPS
    COLUMN_TILES: tl.constexpr = (ALL_COLUMNS + BLOCK_COLUMN - 1) // BLOCK_COLUMN
    TILES: tl.constexpr = (NUM_GROUPS + PACK - 1) // PACK * COLUMN_TILES
    CHANNELS: tl.constexpr = PACK * C
    ALL_K: tl.constexpr = TAPS_H * TAPS_W * CHANNELS
    STEPS: tl.constexpr = (ALL_K + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = NUM_GROUPS % PACK != 0

    # Tiles of the same pixels run next to each other: in channels_last memory they share cache lines.
    program = tl.program_id(0)
    first_group = program % TILES // COLUMN_TILES * PACK
    column = program % COLUMN_TILES * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    row = program // TILES * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    row_ok = row < num_rows
    j = row % ROW_WIDTH
    i = row // ROW_WIDTH % ROW_HEIGHT
    image = row // (ROW_WIDTH * ROW_HEIGHT)

    # Columns: PACK * D channels of out, then the representatives of each of the PACK groups.
    own = tl.zeros_like(column) if PACK == 1 else column // D
    inner = column if PACK == 1 else column % D
    column_ok = column < COLUMNS
    if RAGGED:
        column_ok = column_ok & (first_group + own < NUM_GROUPS)
    read_ok = column_ok
    w_at = w + (first_group + own) * W_GROUP + inner * W_COLUMN
    own_map = column - COLUMNS
    if OWN_MAPS:
        own = tl.where(column < COLUMNS, own, own_map // OWN_MAPS)
        z_ok = (column >= COLUMNS) & (column < ALL_COLUMNS) & (first_group + own < NUM_GROUPS)
        read_ok = read_ok | z_ok
        r_at = r + (first_group * OWN_MAPS + own_map) * W_COLUMN
        # That both begin at such multiples is lost in the choice between them.
        w_at = tl.multiple_of(tl.where(column < COLUMNS, w_at, r_at), R_BYTES)
    if ALL_COLUMNS % BLOCK_COLUMN == 0 and not RAGGED:
        read_ok = tl.full((BLOCK_COLUMN,), True, tl.int1)

    # Bits of the taps that lie outside of x: those of the height from bit 0 on, of the width from bit 16 on. The
    # highest stands for what is beyond the last k.
    x_i = i * X_SCALE_H + X_START_H
    x_j = j * X_SCALE_W + X_START_W
    outside = tl.full((BLOCK_ROW,), -(2**31), tl.int32)
    for t in tl.static_range(TAPS_H):  # pyright: ignore[reportGeneralTypeIssues] it has no annotation
        if (
            X_START_H + t * X_STEP_H < 0
            or (ROW_HEIGHT - 1) * X_SCALE_H + X_START_H + t * X_STEP_H >= X_HEIGHT
        ):
            at = x_i + t * X_STEP_H
            outside |= tl.where((at < 0) | (at >= X_HEIGHT), 1 << t, 0)
    for t in tl.static_range(TAPS_W):  # pyright: ignore[reportGeneralTypeIssues] it has no annotation
        if X_START_W + t * X_STEP_W < 0 or (ROW_WIDTH - 1) * X_SCALE_W + X_START_W + t * X_STEP_W >= X_WIDTH:
            at = x_j + t * X_STEP_W
            outside |= tl.where((at < 0) | (at >= X_WIDTH), 1 << (16 + t), 0)
    outside = tl.where(row_ok, outside, -1)
    x_at = x + (((image * X_HEIGHT + x_i) * X_WIDTH + x_j) * X_CHANNELS + first_group * C)[:, None]

    accumulator = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    # One flat loop, since only innermost loops are pipelined.
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if CHANNELS % BLOCK_K == 0:  # one tap
            tap = step // (CHANNELS // BLOCK_K) + tl.zeros_like(k)
            channel = k - tap * CHANNELS
        else:
            tap = k // CHANNELS
            channel = k % CHANNELS
        t_h = tap // TAPS_W
        t_w = tap % TAPS_W
        taps = (1 << t_h) | (1 << (t_w + 16))
        k_ok = tl.full((BLOCK_K,), True, tl.int1)
        if ALL_K % BLOCK_K != 0:
            k_ok = k < ALL_K
        if RAGGED:
            k_ok = k_ok & (first_group * C + channel < X_CHANNELS)
        taps = tl.where(k_ok, taps, -(2**31))
        x_offset = (t_h * (X_STEP_H * X_WIDTH) + t_w * X_STEP_W) * X_CHANNELS + channel
        pixels = tl.load(x_at + x_offset[None, :], mask=(outside[:, None] & taps[None, :]) == 0, other=0.0)

        depth = channel if PACK == 1 else k % C
        place = (TAP_START_H + t_h * TAP_STEP_H) * KERNEL_W + TAP_START_W + t_w * TAP_STEP_W
        w_offset = depth * W_CHANNEL + place * W_TAP
        meet = k_ok[:, None] & read_ok[None, :]
        if PACK > 1:
            meet = meet & ((k // C % PACK)[:, None] == own[None, :])
        weights = tl.load(w_at[None, :] + w_offset[:, None], mask=meet, other=0.0)
        accumulator = tl.dot(pixels, weights, accumulator, input_precision=PRECISION)

    out_channel = first_group * D + column
    for first_map in range(0, NUM_MAPS, 16):
        maps = first_map + tl.arange(0, 16)
        map_ok = maps < NUM_MAPS
        z_at = z_in + maps[None, :] * num_rows + row[:, None]
        z = tl.load(z_at, mask=row_ok[:, None] & map_ok[None, :], other=0.0)
        coarse_at = coarse + out_channel[None, :] * NUM_MAPS + maps[:, None]
        terms = tl.load(coarse_at, mask=map_ok[:, None] & column_ok[None, :], other=0.0)
        accumulator = tl.dot(z, terms, accumulator, input_precision=PRECISION)

    result = accumulator.to(out.dtype.element_ty)
    out_i = i * OUT_SCALE_H + OUT_START_H
    out_j = j * OUT_SCALE_W + OUT_START_W
    out_at = ((image * OUT_HEIGHT + out_i) * OUT_WIDTH + out_j)[:, None] * OUT_CHANNELS + out_channel[None, :]
    tl.store(out + out_at, result, mask=row_ok[:, None] & column_ok[None, :])
    if OWN_MAPS:
        z_at = z_out + (first_group * OWN_MAPS + own_map)[None, :] * num_rows + row[:, None]
        tl.store(z_at, result, mask=row_ok[:, None] & z_ok[None, :])


@triton.jit
def tap_product(
    x,  # [B, X_HEIGHT, X_WIDTH, X_CHANNELS]
    gy,  # [B, HEIGHT, WIDTH, GY_CHANNELS]
    partials,  # float32 [splits, GY_CHANNELS, TAPS, C]
    num_pixels,  # B * HEIGHT * WIDTH
    pixels_per_split,  # a multiple of BLOCK_PIXELS
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    GY_CHANNELS: tl.constexpr,
    X_HEIGHT: tl.constexpr,
    X_WIDTH: tl.constexpr,
    X_CHANNELS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
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
    CHANNELS: tl.constexpr = PACK * C
    ALL_K: tl.constexpr = TAPS * CHANNELS
    OUT_TILES: tl.constexpr = (PACK * D + BLOCK_OUT - 1) // BLOCK_OUT
    IN_TILES: tl.constexpr = (ALL_K + BLOCK_IN - 1) // BLOCK_IN
    TILES: tl.constexpr = (NUM_GROUPS + PACK - 1) // PACK * OUT_TILES * IN_TILES

    # Tiles vary before splits, so that programs that read the same pixels run together.
    program = tl.program_id(0)
    split = program // TILES
    first_group = program % TILES // (OUT_TILES * IN_TILES) * PACK
    out = program // IN_TILES % OUT_TILES * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = program % IN_TILES * BLOCK_IN + tl.arange(0, BLOCK_IN)
    tap = k // CHANNELS
    channel = k % CHANNELS
    out_ok = (out < PACK * D) & (first_group * D + out < GY_CHANNELS)
    k_ok = (k < ALL_K) & (first_group * C + channel < X_CHANNELS)
    shift_h = tap // KERNEL_W * DILATION_H - PADDING_H
    shift_w = tap % KERNEL_W * DILATION_W - PADDING_W
    gy_at = gy + (first_group * D + out)[None, :]
    x_at = x + ((shift_h * X_WIDTH + shift_w) * X_CHANNELS + first_group * C + channel)[None, :]

    accumulator = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, pixels_per_split, BLOCK_PIXELS):
        first = split * pixels_per_split + start
        pixel = first + tl.arange(0, BLOCK_PIXELS)
        # A tile that divides an image ends with one of them.
        pixel_ok = (first if HEIGHT * WIDTH % BLOCK_PIXELS == 0 else pixel) < num_pixels
        pixel_ok = pixel_ok & tl.full((BLOCK_PIXELS,), True, tl.int1)
        mask = pixel_ok[:, None] & out_ok[None, :]
        gradients = tl.load(gy_at + pixel[:, None] * GY_CHANNELS, mask=mask, other=0.0)
        place = pixel.to(tl.uint32)
        i = (place // WIDTH % HEIGHT).to(tl.int32)
        j = (place % WIDTH).to(tl.int32)
        inside = pixel_ok[:, None] & k_ok[None, :]
        if PADDING_H > 0:
            x_i = (i * STRIDE_H)[:, None] + shift_h[None, :]
            inside = inside & (x_i >= 0) & (x_i < X_HEIGHT)
        if PADDING_W > 0:
            x_j = (j * STRIDE_W)[:, None] + shift_w[None, :]
            inside = inside & (x_j >= 0) & (x_j < X_WIDTH)
        if STRIDE_H * STRIDE_W == 1 and HEIGHT == X_HEIGHT and WIDTH == X_WIDTH:
            x_pixel = pixel
        else:
            image = (place // (WIDTH * HEIGHT)).to(tl.int32)
            x_pixel = (image * X_HEIGHT + i * STRIDE_H) * X_WIDTH + j * STRIDE_W
        values = tl.load(x_at + x_pixel[:, None] * X_CHANNELS, mask=inside, other=0.0)
        accumulator = tl.dot(tl.trans(gradients), values, accumulator, input_precision=PRECISION)

    place = (split * GY_CHANNELS + first_group * D + out) * TAPS
    keep = out_ok[:, None] & k_ok[None, :]
    if PACK > 1:
        keep = keep & ((out // D)[:, None] == (channel // C)[None, :])
        channel = channel % C
    tl.store(partials + place[:, None] * C + (tap * C + channel)[None, :], accumulator, mask=keep)
