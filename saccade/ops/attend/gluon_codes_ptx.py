"""PTX of decoding over codes: what a thread does with its registers, four to a tensor ("quads").

The product is `mma.m16n8k16`: A holds 16 keys (or channels) by 16, B 16 by 8 rows of queries, C is
16 by 8 in float32.
Lane 4 g + t owns rows g and g + 8 of A and C, columns 2t, 2t + 1 of A and C, and column g of B.

Codes become float16 by their bits: 0x6400 | code is 1024 + code, and four bits higher up,
0x5400 | code << 4 is 64 + code.  What was added is taken away once for a whole tile, by a product
of the same rounded factors with a constant, so a code costs half an instruction or less.
Source of the bit patterns: Kim et al., 2022 (arXiv 2211.10017).
"""

from __future__ import annotations

from triton import constexpr_function

LOW = {"int4": 0x6400 + 8, "int8": 0x6400 + 128, "fp8": 0}  # 1024 + the middle code, as float16
HIGH = {"int4": 0x5400 + (8 << 4), "int8": 0x6400 + 128, "fp8": 0}  # the same, upper half of a head
MIDDLE = {"int4": 0x4800, "int8": 0x5800, "fp8": 0}  # the middle code: 8, 128, 0 as float16
MIDDLES = {"int4": "0f41000000", "int8": "0f43000000", "fp8": "0f00000000"}  # as float32
SIGN = 0x8000


@constexpr_function
def planes(kind: str) -> int:
    """Words a thread reads of a key for the same channels of both halves: int4 shares them."""
    return 1 if kind == "int4" else 2


@constexpr_function
def constraints(outs: str, ins: str) -> str:
    """Constraints of quads: one letter a quad."""
    given = [f"=&{kind}" for kind in outs] + list(ins)
    return ",".join(kind for kind in given for _ in range(4))


@constexpr_function
def quad(n: int) -> list[str]:
    """Names of the four registers of operand n, outputs counted first."""
    return [f"${4 * n + r}" for r in range(4)]


@constexpr_function
def twice(half: int) -> str:
    """A float16 in both halves of a word."""
    return hex(half * 0x10001)


@constexpr_function
def block(lines: list[str]) -> str:
    """Statements with names of their own: x# for words, f# for float32."""
    return "{ .reg .b32 x<64>; .reg .f32 f<64>; .reg .b16 h<8>; " + " ".join(lines) + " }"


@constexpr_function
def mma(d: list[str], a: list[str], b: list[str], c: list[str]) -> str:
    """d = a b + c."""
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


@constexpr_function
def nibbles(to: str, x: str, half: int) -> str:
    """Bits 0-3 and 16-19 (half 0) or 4-7 and 20-23 (half 1) of x as two numbers in float16."""
    mask, magic = (("0x000f000f", "0x64006400"), ("0x00f000f0", "0x54005400"))[half]
    return f"lop3.b32 {to}, {x}, {mask}, {magic}, 0xea;"


@constexpr_function
def bytes_of(to: list[str], x: str, kind: str) -> list[str]:
    """Bytes 0, 1 and bytes 2, 3 of x as two words of float16 (int8, fp8)."""
    if kind == "fp8":
        return [
            f"mov.b32 {{h0, h1}}, {x};",
            f"cvt.rn.f16x2.e4m3x2 {to[0]}, h0;",
            f"cvt.rn.f16x2.e4m3x2 {to[1]}, h1;",
        ]
    return [
        f"prmt.b32 {to[0]}, {x}, 0x64646464, 0x4140;",
        f"prmt.b32 {to[1]}, {x}, 0x64646464, 0x4342;",
    ]


@constexpr_function
def numbers(to: list[str], x: str, kind: str, scratch: str) -> list[str]:
    """Words of float16 from four bytes: to[0], to[1] of the lower half and, of int4, to[2], to[3]
    of the upper; each pair is bytes (0, 1), (2, 3), of int4 bytes (0, 2), (1, 3)."""
    if kind != "int4":
        return bytes_of(to, x, kind)
    return [
        nibbles(to[0], x, 0),
        nibbles(to[2], x, 1),
        f"shr.u32 {scratch}, {x}, 8;",
        nibbles(to[1], scratch, 0),
        nibbles(to[3], scratch, 1),
    ]


@constexpr_function
def load(offset: int, width: int, once: bool) -> str:
    """Four words from memory, `width` of them side by side, at the addresses of a quad + offset.

    What is read `once` is kept out of the L1 cache.
    """
    to, at = quad(0), quad(1)
    how = ".L1::no_allocate.L2::128B" if once else ""
    vector = {1: "", 2: ".v2", 4: ".v4"}[width]
    lines = []
    for i in range(0, 4, width):
        names = ", ".join(to[i : i + width])
        names = names if width == 1 else f"{{{names}}}"
        lines.append(f"ld.global.nc{how}{vector}.b32 {names}, [{at[i]} + {offset}];")
    return " ".join(lines)


@constexpr_function
def prefetch(level: str) -> str:
    """Bring a line of the cache at the address of a quad closer."""
    return f"prefetch.global.{level} [$4]; mov.b32 $0, 0;"


@constexpr_function
def begin_early() -> str:
    """Wait for what the kernels before have written, then let the next one start (sm_90)."""
    return "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"


@constexpr_function
def to_half() -> str:
    """A quad of bfloat16 pairs as float16 pairs."""
    lines = []
    for to, x in zip(quad(0), quad(1), strict=True):
        lines += [
            f"shl.b32 x0, {x}, 16; and.b32 x1, {x}, 0xffff0000; mov.b32 f0, x0; mov.b32 f1, x1;",
            f"cvt.rn.f16x2.f32 {to}, f1, f0;",
        ]
    return block(lines)


@constexpr_function
def fold(kind: str) -> str:
    """q' = q scale of eight channels, in the order in which codes are unpacked.

    Operands: out q'; in q, scale.
    """
    folded, q, scale = (quad(n) for n in range(3))
    lines = [f"mul.rn.f16x2 x{r}, {q[r]}, {scale[r]};" for r in range(4)]
    for r in (0, 2):
        if kind == "int4":
            lines += [
                f"prmt.b32 {folded[r]}, x{r}, x{r + 1}, 0x5410;",
                f"prmt.b32 {folded[r + 1]}, x{r}, x{r + 1}, 0x7632;",
            ]
        else:
            lines += [f"mov.b32 {folded[r + i]}, x{r + i};" for i in (0, 1)]
    return block(lines)


@constexpr_function
def shift_of(kind: str, half_quads: int) -> str:
    """What has to be added to all scores of a tile, for columns 2t, 2t + 1: a quad (a, b, a, b).

    q . offset + middle (q . scale) - (1024 + middle) (q' . 1), with q' as it was rounded.
    Operands: out; in quads by halves of q', q, scale, offset.
    """
    count = 2 * half_quads
    lines = [f"mov.f32 f{i}, 0f00000000;" for i in range(12)]
    for n in range(count):
        rounded, q, scale, offset = (quad(1 + part * count + n) for part in range(4))
        extra = (LOW, HIGH)[n // half_quads][kind]
        lines.append(f"mov.b32 x0, {twice(extra | SIGN)};")
        terms = [(0, offset, q)]
        if extra:
            terms += [(4, scale, q), (8, ["x0"] * 4, rounded)]
        for chain, a, b in terms:
            acc = [f"f{chain + r}" for r in range(4)]
            for r in (0, 2):  # every row of A is the same
                lines.append(mma(acc, [a[r], a[r], a[r + 1], a[r + 1]], b[r : r + 2], acc))
    for r in range(4):
        lines.append(f"add.f32 f{r}, f{r}, f{8 + r};")
        lines.append(f"fma.rn.f32 {quad(0)[r]}, f{4 + r}, {MIDDLES[kind]}, f{r};")
    return block(lines)


@constexpr_function
def scores(kind: str, half_quads: int) -> str:
    """q' . codes of 16 keys: two slots of every g.

    Operands: out scores; in q' (lower half, upper half), then codes: for each plane the words of
    the first slot, of the second (two words each, in one quad, where half_quads is 1).
    """
    acc = [f"f{r}" for r in range(4)]
    lines = [f"mov.f32 {x}, 0f00000000;" for x in acc]
    codes = 1 + 2 * half_quads
    for plane in range(planes(kind)):
        registers = [x for n in range(half_quads) for x in quad(codes + plane * half_quads + n)]
        if half_quads == 1:
            slots = registers[:2], registers[2:]
        else:
            slots = registers[:4], registers[4:]
        for w, words in enumerate(zip(*slots, strict=True)):
            for slot, word in enumerate(words):
                lines += numbers([f"x{4 * slot + i}" for i in range(4)], word, kind, "x8")
            for half in (0, 1) if kind == "int4" else (plane,):
                first = 2 * (half if kind == "int4" else 0)
                a = [f"x{first}", f"x{4 + first}", f"x{first + 1}", f"x{5 + first}"]
                b = quad(1 + half * half_quads + w // 2)[2 * (w % 2) :][:2]
                lines.append(mma(acc, a, b, acc))
    lines += [f"mov.f32 {to}, {x};" for to, x in zip(quad(0), acc, strict=True)]
    return block(lines)


@constexpr_function
def butterfly(x: str, combine: str) -> list[str]:
    """x over the eight g of the lanes with the same t."""
    return [
        f"shfl.sync.bfly.b32 x0, {x}, {lanes}, 0x1f, 0xffffffff;"
        f" mov.b32 f9, x0; {combine}.f32 {x}, {x}, f9;"
        for lanes in (4, 8, 16)
    ]


@constexpr_function
def over_keys(combine: str, count: int) -> str:
    """Maximum (`max`) or sum (`add`) over the keys of `count` quads: a quad (a, b, a, b)."""
    lines = []
    for column in (0, 1):
        values = [x for n in range(count) for x in quad(1 + n)[column::2]]
        while len(values) > 1:
            pairs = list(zip(values[::2], values[1::2], strict=True))
            names = [f"f{10 + 20 * column + len(pairs) + i}" for i in range(len(pairs))]
            lines += [
                f"{combine}.f32 {to}, {a}, {b};" for to, (a, b) in zip(names, pairs, strict=True)
            ]
            values = names
        lines += [f"mov.f32 f{column}, {values[0]};", *butterfly(f"f{column}", combine)]
        lines += [f"mov.f32 {quad(0)[column + i]}, f{column};" for i in (0, 2)]
    return block(lines)


@constexpr_function
def pairs_of_tokens(words: list[str], groups: int, to: str) -> list[str]:
    """Numbers of eight tokens as pairs of neighbours: `to`e of the lower half's, `to`e + 4 of the
    upper half's; words hold both halves of a token, or (one group) two tokens."""
    lines = []
    for e in range(4):
        if groups == 2:
            both = f"{words[2 * e]}, {words[2 * e + 1]}"
            lines.append(f"prmt.b32 {to}{e}, {both}, 0x5410;")
            lines.append(f"prmt.b32 {to}{e + 4}, {both}, 0x7632;")
        else:
            lines.append(f"mov.b32 {to}{e}, {words[e]}; mov.b32 {to}{e + 4}, {words[e]};")
    return lines


@constexpr_function
def weights(kind: str, groups: int) -> str:
    """Weights of 32 keys as B of the product with values, and what the middle codes amount to.

    Operands: out weights of the first 16 keys (lower half b0 b1, upper half b0 b1), of the second,
    sums (lower half a, b, upper half a, b); in weights p (two quads), scales, offsets (as many
    quads as a token has groups), sums.
    """
    p = [quad(3), quad(4)]
    scale = [x for i in range(groups) for x in quad(5 + i)]
    offset = [x for i in range(groups) for x in quad(5 + groups + i)]
    sums, acc = quad(5 + 2 * groups), [f"f{r}" for r in range(4)]
    lines = [f"mov.f32 {to}, {x};" for to, x in zip(acc, sums, strict=True)]
    lines.append(f"mov.b32 x60, {twice(MIDDLE[kind])}; mov.b32 x61, 0;")
    lines.append(f"mov.b32 x62, {twice(LOW[kind] | SIGN)};")
    lines.append(f"mov.b32 x63, {twice(HIGH[kind] | SIGN)};")
    middle = [f"x{40 + i}" for i in range(4 * groups)]
    for to, s, o in zip(middle, scale, offset, strict=True):
        lines.append(f"fma.rn.f16x2 {to}, {s}, x60, {o};")
    lines += pairs_of_tokens(scale, groups, "x")  # x0 .. x7
    lines += pairs_of_tokens(middle, groups, "x1")  # x10 .. x17
    for n in (0, 1):
        for i in (0, 1):
            b = f"x{20 + i}"
            lines.append(f"cvt.rn.f16x2.f32 {b}, {p[n][2 * i + 1]}, {p[n][2 * i]};")
            lines.append(f"movmatrix.sync.aligned.m8n8.trans.b16 {b}, {b};")
            for half in (0, 1):
                lines.append(f"mul.rn.f16x2 x{30 + 2 * half + i}, {b}, x{2 * n + i + 4 * half};")
        e = 10 + 2 * n
        a = [f"x{e}", f"x{e + 4}", f"x{e + 1}", f"x{e + 5}"]  # rows g: lower half, g + 8: upper
        lines.append(mma(acc, a, ["x20", "x21"], acc))
        if LOW[kind]:
            lines.append(mma(acc, ["x62", "x61", "x62", "x61"], ["x30", "x31"], acc))
            lines.append(mma(acc, ["x61", "x63", "x61", "x63"], ["x32", "x33"], acc))
        lines += [f"mov.b32 {to}, x{30 + r};" for r, to in enumerate(quad(n))]
    lines += [f"mov.f32 {to}, {x};" for to, x in zip(quad(2), acc, strict=True)]
    return block(lines)


@constexpr_function
def weigh(kind: str, half_quads: int, tiles: int) -> str:
    """acc shrink + sums + weights . codes, of the tokens of a step, for all channels.

    The large numbers that sums take away meet those of the codes before they meet `acc`, so that
    they never swallow digits of it.
    Operands: out acc (half, word, byte pair); in codes (for each tile and plane: tokens a, b; c, d,
    or all in one quad where half_quads is 1), weights of each tile, sums, shrink, acc.
    """
    count = 4 * half_quads
    vectors = planes(kind) * half_quads
    first_weight = count + tiles * vectors
    sums, shrink = quad(first_weight + tiles), quad(first_weight + tiles + 1)
    lines = [f"mov.f32 f{40 + n}, {sums[n // 4 * 2 + n % 2]};" for n in range(8)]
    for plane in range(planes(kind)):
        for w in range(half_quads):
            for u in (0, 1):
                halves = (0, 1) if kind == "int4" else (plane,)
                for i in range(tiles):
                    at = count + i * vectors + plane * half_quads
                    registers = [x for n in range(half_quads) for x in quad(at + n)]
                    tokens = registers[w::half_quads]  # word w of a, b, c, d
                    start = 0 if i else 40
                    lines += _weigh_pair(kind, u, halves, tokens, quad(first_weight + i), start)
                for half in halves:
                    n = half * 2 * half_quads + 2 * w + u
                    acc = quad(first_weight + tiles + 2 + n)
                    lines += [
                        f"fma.rn.f32 {quad(n)[r]}, {acc[r]}, {shrink[r]}, f{4 * half + r};"
                        for r in range(4)
                    ]
    return block(lines)


@constexpr_function
def _weigh_pair(
    kind: str, u: int, halves: tuple[int, ...], tokens: list[str], b: list[str], start: int
) -> list[str]:
    """f0 .. f3 (lower half), f4 .. f7 (upper) = weights . bytes 2u and 2u + 1 of four tokens, plus
    the floats from `start` on."""
    lines = []
    # int4: bytes [a a b b] of two tokens, nibbles of the same place then lie 16 bits apart.
    chosen = ("0x5410", "0x7632") if kind == "int4" else ("0x5140", "0x7362")
    for i in (0, 1):
        lines.append(f"prmt.b32 x{20 + i}, {tokens[2 * i]}, {tokens[2 * i + 1]}, {chosen[u]};")
        lines += numbers([f"x{4 * i + r}" for r in range(4)], f"x{20 + i}", kind, "x22")
    for half in halves:
        first = 2 * half if kind == "int4" else 0
        acc = [f"f{4 * half + r}" for r in range(4)]
        a = [f"x{first}", f"x{first + 1}", f"x{4 + first}", f"x{5 + first}"]
        before = [f"f{start + 4 * half + r}" for r in range(4)]
        lines.append(mma(acc, a, b[2 * half :][:2], before))
    return lines
