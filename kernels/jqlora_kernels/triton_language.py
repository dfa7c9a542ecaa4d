"""The kernels in Triton's own language, for those who call Triton other than through Pallas.

Pointers and compile-time numbers alone: nothing here knows JAX, so that Triton's interpreter can
run what is here on any machine (``TRITON_INTERPRET=1``).

Operands are laid out as in ``triton_tiles``: whole arrays with a layer axis in front.
"""

# pyright: reportOperatorIssue=false
# (what the values of a kernel are, only Triton's compiler knows)
import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_scales(
    scales,
    absmax,
    offset,
    table,
    layer,
    block,
    mask,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """fp32 scales of the blocks numbered ``block`` of one layer; 0 where masked."""
    stored = tl.load(scales + layer * BLOCKS + block, mask=mask, other=0)
    if NESTED:
        value = tl.load(table + stored.to(tl.int32))
        group_scale = tl.load(absmax + layer * GROUPS + block // GROUP, mask=mask, other=0.0)
        # The minimum keeps the product from being fused with the addition: it is rounded first.
        product = tl.minimum(value * group_scale, LARGEST)
        scale = product + tl.load(offset + layer)
    else:
        scale = stored
    return scale


@triton.jit
def decode_tile(
    layers,
    codes,
    scales,
    codebook,
    absmax,
    offset,
    table,
    out,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """One tile of bytes into ``PARTS`` times as many values."""
    place = tl.program_id(0)
    layer = tl.load(layers + place).to(tl.int64)
    byte = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = byte < BYTES
    packed = tl.load(codes + layer * BYTES + byte, mask=mask, other=0).to(tl.int32)
    block = PARTS * byte // BLOCK
    scale = load_scales(
        scales, absmax, offset, table, layer, block, mask, BLOCKS, GROUPS, GROUP, NESTED
    )
    if PARTS == 2:
        high = tl.load(codebook + (packed >> 4)) * scale
        low = tl.load(codebook + (packed & 15)) * scale
        values = tl.interleave(high, low)
    else:
        values = tl.load(codebook + packed) * scale
    element = tl.program_id(1) * (PARTS * TILE) + tl.arange(0, PARTS * TILE)
    target = out + place.to(tl.int64) * COUNT + element
    tl.store(target, values.to(out.dtype.element_ty), mask=element < COUNT)


@triton.jit
def weight_tile(
    codes,
    scales,
    codebook,
    absmax,
    offset,
    table,
    layer,
    row,
    byte,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Decoded even and odd columns, fp32, of the rows ``row`` at the bytes ``byte`` of each.

    With one code to a byte there is but one part, every column: it is returned twice.
    """
    inside = row < N
    first = PARTS * tl.min(byte, axis=0) // BLOCK
    scale = load_scales(
        scales,
        absmax,
        offset,
        table,
        layer,
        row * (PARTS * WIDTH // BLOCK) + first,
        inside,
        BLOCKS,
        GROUPS,
        GROUP,
        NESTED,
    )
    place = layer * N * WIDTH + row[:, None].to(tl.int64) * WIDTH + byte[None, :]
    packed = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.int32)
    if PARTS == 2:
        even = tl.load(codebook + (packed >> 4)) * scale[:, None]
        odd = tl.load(codebook + (packed & 15)) * scale[:, None]
    else:
        even = tl.load(codebook + packed) * scale[:, None]
        odd = even
    return even, odd


@triton.jit
def forward_tile(
    x,
    layers,
    codes,
    scales,
    codebook,
    absmax,
    offset,
    table,
    out,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """``ROWS`` x ``FEATURES`` of the product, along all of K."""
    layer = tl.load(layers).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, WIDTH, BYTES):
        byte = start + tl.arange(0, BYTES)
        even, odd = weight_tile(
            codes, scales, codebook, absmax, offset, table, layer, n, byte,
            N, WIDTH, BLOCKS, PARTS, BLOCK, GROUPS, GROUP, NESTED,
        )  # fmt: skip
        place = x + m[:, None].to(tl.int64) * (PARTS * WIDTH) + PARTS * byte[None, :]
        left = tl.load(place, mask=(m < COUNT)[:, None], other=0.0)
        total = tl.dot(left, tl.trans(even.to(left.dtype)), total, input_precision="ieee")
        if PARTS == 2:
            left = tl.load(place + 1, mask=(m < COUNT)[:, None], other=0.0)
            total = tl.dot(left, tl.trans(odd.to(left.dtype)), total, input_precision="ieee")
    target = out + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m < COUNT)[:, None] & (n < N)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def transposed_tile(
    g,
    layers,
    codes,
    scales,
    codebook,
    absmax,
    offset,
    table,
    out,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """``ROWS`` x ``PARTS * BYTES`` of the gradient, along all of N."""
    layer = tl.load(layers).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    evens = tl.zeros((ROWS, BYTES), tl.float32)
    odds = tl.zeros((ROWS, BYTES), tl.float32)
    for start in range(0, N, FEATURES):
        n = start + tl.arange(0, FEATURES)
        even, odd = weight_tile(
            codes, scales, codebook, absmax, offset, table, layer, n, byte,
            N, WIDTH, BLOCKS, PARTS, BLOCK, GROUPS, GROUP, NESTED,
        )  # fmt: skip
        place = g + m[:, None].to(tl.int64) * N + n[None, :]
        left = tl.load(place, mask=(m < COUNT)[:, None] & (n < N)[None, :], other=0.0)
        evens = tl.dot(left, even.to(left.dtype), evens, input_precision="ieee")
        if PARTS == 2:
            odds = tl.dot(left, odd.to(left.dtype), odds, input_precision="ieee")
    values = tl.interleave(evens, odds) if PARTS == 2 else evens
    column = tl.program_id(1) * (PARTS * BYTES) + tl.arange(0, PARTS * BYTES)
    target = out + m[:, None].to(tl.int64) * (PARTS * WIDTH) + column[None, :]
    mask = tl.broadcast_to((m < COUNT)[:, None], (ROWS, PARTS * BYTES))
    tl.store(target, values.to(out.dtype.element_ty), mask=mask)
