"""The packed digits of a sketch's codes, two in a word at a time, in the order of `append_sketch.arranged`."""

import triton
import triton.language as tl


@triton.jit
def byte_of(upper, column, WORDS: tl.constexpr):
    """Return which byte of a code lies in a column, in the upper or the lower byte of half a word."""
    return column // 2 % WORDS * 4 + column % 2 * 2 + upper


@triton.jit
def write_code(
    written, code, inside, D: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Write the bytes of codes in the order of digits, which are `WIDTH` bits of them from `SHIFT` on."""
    count: tl.constexpr = 8 // WIDTH
    digit = tl.reshape((code >> SHIFT) & ((1 << WIDTH) - 1), [2, count, 2 * WORDS])
    packed = tl.sum(digit << (tl.arange(0, count) * WIDTH)[None, :, None], 1)
    byte = byte_of(tl.arange(0, 2)[:, None], tl.arange(0, 2 * WORDS)[None, :], WORDS)
    tl.store(written + byte, packed.to(tl.uint8), mask=byte < (D * WIDTH + 7) // 8 * inside.to(tl.int32))


@triton.jit
def words_of(codes, places, there, SIZE: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr):
    """Return `SIZE` bytes of tokens' codes from the `FIRST` on, as words [WORDS, tokens] int32."""
    word = tl.arange(0, WORDS)[:, None]
    if SIZE % 4 == 0 and BYTES % 4 == 0:
        sketched = codes.to(tl.pointer_type(tl.int32)) + (places * (BYTES // 4))[None, :] + FIRST // 4
        words = tl.load(sketched + word, mask=there[None, :] & (word < SIZE // 4), other=0)
    else:
        sketched = codes + (places * BYTES)[None, :] + FIRST
        words = tl.zeros([WORDS, places.shape[0]], tl.int32)
        for i in tl.static_range(4):
            byte = 4 * word + i
            words |= tl.load(sketched + byte, mask=there[None, :] & (byte < SIZE), other=0).to(tl.int32) << (8 * i)
    return words


@triton.jit
def digits_of(words, WIDTH: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Return digits of words [words, tokens] times their place values in a byte, as float16 [digits, tokens], exactly.

    One instruction masks two digits, in the halves of a word. Ten low bits alone are a subnormal float16, so digits
    come times 2^-24; where matrix products take those for zero, 1024 is added for a moment, whose last bits they are.
    """
    count: tl.constexpr = 8 // WIDTH
    shift = (tl.arange(0, 2) * 8)[:, None, None, None]
    mask = (((1 << WIDTH) - 1) * 0x00010001 << (tl.arange(0, count) * WIDTH))[None, :, None, None]
    pair = (words[None, None, :, :] >> shift) & mask
    if not SUBNORMAL:
        pair = pair | 0x64006400
    low = pair.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    both = tl.permute(tl.join(low, high), (0, 1, 2, 4, 3))
    digits = tl.reshape(both, [4 * count * words.shape[0], words.shape[1]])
    if not SUBNORMAL:
        digits -= 1024.0
    return digits


@triton.jit
def digit_weights(weight, WIDTH: tl.constexpr, WORDS: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Return weights of digits as those of digits times their places, in two halves, and what products are times.

    Weights [heads, columns] come twice in a row: in the first half of the heads a float16 stays, in the second what it
    lacks. With the last bit or two of float32 they make for it, in products with small whole numbers.
    """
    largest = tl.max(tl.abs(weight), 1)
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23)
    unit = bits.to(tl.float32, bitcast=True)
    digit = tl.arange(0, weight.shape[1]) // (2 * WORDS) % (8 // WIDTH)
    place = (1 << (8 - WIDTH - digit * WIDTH)).to(tl.float32)  # the other way round: small weights would lose bits
    scaled = weight * ((254 << 23) - bits).to(tl.float32, bitcast=True)[:, None] * place[None, :]
    high = scaled.to(tl.float16)
    lacking: tl.constexpr = 2048.0  # times this, what eleven bits lack is a float16
    low = ((scaled - high.to(tl.float32)) * lacking).to(tl.float16)
    first = tl.arange(0, weight.shape[0]) < weight.shape[0] // 2
    unit *= tl.where(first, 1.0, 1.0 / lacking) * (2.0 ** (16 + WIDTH) if SUBNORMAL else 2.0 ** (WIDTH - 8))
    return tl.where(first[:, None], high, low), unit
