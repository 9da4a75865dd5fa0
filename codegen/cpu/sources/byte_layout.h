//: Where quantized values of a row go as bytes, the same on every CPU. integer_products.h multiplies them.
// ------------------------------------------------------------------------------------------------ codes as bytes
//
// With AVX-512 VNNI codes are multiplied as bytes, four products and their sum to a lane; not so uncoded sides, values
// with float16 channels, and all with -DFHOPT_FLOAT. What codes are multiplied with becomes a sum of signed bytes:
// q = unit * (q0 + 256 q1 + 65536 q2), a weight likewise.
//
//     keys      a vector of codes:  4 channels of 16 tokens   times a part of q[r]:  4 channels, the same for all lanes
//       one r   a vector of codes:  64 channels of a token    times a part of q:     64 channels
//     values    a vector of codes:  16 channels of 4 tokens   times a part of w[r]:  4 tokens, the same for all lanes
//
// A row is taken apart 64 channels, a slice, at a time: its bytes are brought to the eight bytes of those channels that
// have bits in them, then the bits of each channel to the upper end of its own byte, once for each plane of bits. That
// a code b is then 2^(8-b) times itself is folded into the query or the output.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && \
    !defined(FHOPT_FLOAT)
#define INTEGER true
#else
#define INTEGER false
#endif

// A code of a row: in its first plane it has `high` bits from bit `high_bit` of the row on, `low` in its second.
struct Code {
    int channel, high, high_bit, low, low_bit;

    constexpr int shift() const { return 8 - high - low; }  // of the code in its byte
};

template <class Side>
struct Layout {
    Code codes[Side::WIDTH + 1] = {};
    int count = 0, halves = 0;  // codes, float16 channels
    int half_channel[Side::WIDTH + 1] = {}, half_byte[Side::WIDTH + 1] = {};

    constexpr Layout() {
        int bit = 0, channel = 0;
        for (Tier tier : Side::TIERS) {
            const int high = tier.bits >= 8 ? 8 : tier.bits >= 4 ? 4 : tier.bits >= 2 ? 2 : 1, low = tier.bits - high;
            for (int i = 0; i < tier.width; i++) {
                if (tier.bits < 16) add({channel + i, high, bit + i * high, low, bit + tier.width * high + i * low});
                if (tier.bits == 16) add_half(channel + i, bit / 8 + 2 * i);
            }
            bit += tier.bits * tier.width;
            channel += tier.width;
        }
    }
    constexpr void add(Code code) { codes[count++] = code; }
    constexpr void add_half(int channel, int byte) {
        half_channel[halves] = channel;
        half_byte[halves++] = byte;
    }
};

constexpr Layout<Keys> KEY_LAYOUT;
constexpr Layout<Values> VALUE_LAYOUT;
constexpr int KEY_VECTORS = KEY_LAYOUT.count / 4, VALUE_VECTORS = (VALUE_LAYOUT.count + 15) / 16;
constexpr int KEY_DWORDS = (KEY_VECTORS + 15) / 16 * 16;  // of a part of a query, in whole vectors
constexpr bool INTEGER_KEYS = INTEGER && Keys::SCALED;
constexpr bool INTEGER_VALUES = INTEGER && Values::SCALED && VALUE_LAYOUT.halves == 0;
