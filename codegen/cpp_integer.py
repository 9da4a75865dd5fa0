"""The part of the C++ kernel that multiplies codes as bytes, on CPUs with AVX-512 VNNI: text for `cpp.render`.

`LAYOUT` says where codes go and is the same on every CPU; `PRODUCTS` needs the instructions.
"""

LAYOUT = """\
// ------------------------------------------------------------------------------------------------ codes as bytes
//
// With AVX-512 VNNI codes are multiplied as bytes, four products and their sum to a lane; not so uncoded sides, values
// with float16 channels, and all with -DFHOPT_FLOAT. What codes are multiplied with becomes a sum of signed bytes:
// q = unit * (q0 + 256 q1 + 65536 q2), a weight likewise.
//
//     keys      a vector of codes:  4 channels of 16 tokens   times a part of q[r]:  4 channels, the same for all lanes
//     values    a vector of codes:  16 channels of 4 tokens   times a part of w[r]:  4 tokens, the same for all lanes
//
// Rows are brought to that shape while they are packed, by bytes; only then bits are taken apart, always by the same
// rule. The unit is 8 channels: they fill one byte of a plane of 1 bit, 2 of a plane of 2 bits, and so on. Four such
// groups, of one tier or of several, make a quad. A code stands at the upper end of its byte as far as the codes beside
// it allow; that it is 2^shift times itself is folded into the query or the output.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && !defined(FHOPT_FLOAT)
#define INTEGER true
#else
#define INTEGER false
#endif

struct Group {
    int bits, channel, high, low;  // its first channel, and the bytes of a row where its two planes begin
};

struct Quad {
    Group groups[4];
    int size, kinds, planes;  // bit b of `kinds`: there is a group of b bits; of `planes`, as a sum: a plane of b bits

    constexpr bool has(int bits) const { return kinds >> bits & 1; }
    constexpr bool takes(int bits) const {  // 6, 5 and 3 bits have no common places
        const int all = kinds | 1 << bits, clash = 1 << 6 | 1 << 5 | 1 << 3;
        return size < 4 && (all & clash) != clash;
    }
    constexpr int place(int plane) const {  // the bit of a byte where a plane's part of a code begins
        if (plane == 8) return 0;
        if (plane == 4) return 4;
        if (plane == 2) return has(6) ? 2 : has(5) && has(3) ? 4 : 6;
        return has(5) ? 3 : has(3) ? place(2) - 1 : 7;
    }
    constexpr int shift(int bits) const { return place(bits & -bits); }  // of a whole code: where its last plane begins
    constexpr int byte(int g, int plane, int i) const {  // where byte i of a group's plane is in a row; -1: nowhere
        if (g >= size || !(groups[g].bits & plane)) return -1;
        return (groups[g].bits < 2 * plane ? groups[g].high : groups[g].low) + i;
    }
};

template <class Side>
struct Layout {
    Quad quads[Side::WIDTH / 8 + 1] = {};
    int count = 0, halves = 0;  // quads, float16 channels
    int half_channel[Side::WIDTH + 1] = {}, half_byte[Side::WIDTH + 1] = {};

    constexpr Layout() {
        int byte = 0, channel = 0;
        for (Tier tier : Side::TIERS) {
            const int high = tier.bits >= 8 ? 8 : tier.bits >= 4 ? 4 : tier.bits >= 2 ? 2 : 1, low = tier.bits - high;
            for (int i = 0; i < tier.width; i++) {
                if (tier.bits == 16) add_half(channel + i, byte + 2 * i);
                if (tier.bits < 16 && i % 8 == 0) {
                    add({tier.bits, channel + i, byte + i / 8 * high, byte + tier.width / 8 * high + i / 8 * low});
                }
            }
            byte += tier.bits * tier.width / 8;
            channel += tier.width;
        }
    }
    constexpr void add_half(int channel, int byte) {
        half_channel[halves] = channel;
        half_byte[halves++] = byte;
    }
    constexpr void add(Group group) {
        if (count == 0 || !quads[count - 1].takes(group.bits)) count++;
        Quad& quad = quads[count - 1];
        quad.groups[quad.size++] = group;
        quad.kinds |= 1 << group.bits;
        quad.planes |= group.bits;
    }
};

constexpr Layout<Keys> KEY_LAYOUT;
constexpr Layout<Values> VALUE_LAYOUT;
constexpr int KEY_VECTORS = 8 * KEY_LAYOUT.count, VALUE_VECTORS = 2 * VALUE_LAYOUT.count;
constexpr bool INTEGER_KEYS = INTEGER && Keys::SCALED;
constexpr bool INTEGER_VALUES = INTEGER && Values::SCALED && VALUE_LAYOUT.halves == 0;

// Where the sum of channel i of a group is: vector i % 2 of its quad, lanes of four groups for each of i / 2.
constexpr int place_of(int quad, int group, int i) { return quad * 32 + i % 2 * 16 + i / 2 * 4 + group; }
"""

PRODUCTS = """\
// ------------------------------------------------------------------------------------------------ products of bytes

#if INTEGER

template <class F, int... I>
INLINE void each(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(0), ..., f(N - 1), each with a compile-time argument.
template <int N, class F>
INLINE void each(F f) {
    each(std::make_integer_sequence<int, N>(), f);
}

template <class F>
INLINE void each_plane(F f) {
    each(std::integer_sequence<int, 8, 4, 2, 1>(), f);
}

// Vectors that a quad's planes fill, of 16 tokens or of 4.
constexpr int key_vectors(int planes) { return planes; }
constexpr int value_vectors(int planes) {
    return (planes & 8) / 4 + (planes & 4) / 4 + (planes & 2) / 2 + (planes & 1);
}

template <class Side, class F>
constexpr int vectors_before(const Layout<Side>& layout, int quad, F vectors) {
    int sum = 0;
    for (int i = 0; i < quad; i++) sum += vectors(layout.quads[i].planes);
    return sum;
}

constexpr int KEY_PLANES = vectors_before(KEY_LAYOUT, KEY_LAYOUT.count, key_vectors);
constexpr int VALUE_PLANES = vectors_before(VALUE_LAYOUT, VALUE_LAYOUT.count, value_vectors);
constexpr int KEY_STAGES = (KEY_PLANES + KEY_LAYOUT.halves / 2 + 15) / 16, VALUE_STAGES = (VALUE_PLANES + 3) / 4;

// Which bytes of a row go where in STAGES vectors of 64 bytes; the others are 0. A row is read as pairs of vectors.
template <class Side, int STAGES>
struct Stages {
    static constexpr int PAIRS = (Side::BYTES + 127) / 128;
    alignas(64) uint8_t index[STAGES + 1][PAIRS][64] = {};
    uint64_t mask[STAGES + 1][PAIRS] = {};

    constexpr void put(int to, int from) {
        if (from < 0) return;
        index[to / 64][from / 128][to % 64] = uint8_t(from % 128);
        mask[to / 64][from / 128] |= uint64_t(1) << to % 64;
    }
};

// Keys: a dword is a byte of each group of a quad, or two float16 channels.
constexpr auto key_stages() {
    Stages<Keys, KEY_STAGES> stages;
    int to = 0;
    for (int q = 0; q < KEY_LAYOUT.count; q++) {
        for (int plane = 8; plane > 0; plane /= 2) {
            for (int i = 0; i < (KEY_LAYOUT.quads[q].planes & plane); i++) {
                for (int g = 0; g < 4; g++) stages.put(to++, KEY_LAYOUT.quads[q].byte(g, plane, i));
            }
        }
    }
    for (int i = 0; i < 2 * KEY_LAYOUT.halves; i++) stages.put(to++, KEY_LAYOUT.half_byte[i / 2] + i % 2);
    return stages;
}

// Values: 16 bytes, for each of 4 pairs of channels a byte of each group; `interleave` says how they lie.
constexpr auto value_stages() {
    Stages<Values, VALUE_STAGES> stages;
    int vector = 0;
    for (int q = 0; q < VALUE_LAYOUT.count; q++) {
        for (int plane = 8; plane > 0; plane /= 2) {
            const int vectors = value_vectors(VALUE_LAYOUT.quads[q].planes & plane);
            for (int i = 0; i < vectors; i++, vector++) {
                for (int to = 0; to < 16; to++) {
                    const int channel = to / 4 * 2 + i, g = to % 4;
                    const int byte = VALUE_LAYOUT.quads[q].byte(g, plane, channel * plane / 8);
                    stages.put(vector / 4 * 64 + to / 4 * 16 + vector % 4 * 4 + g, byte);
                }
            }
        }
    }
    return stages;
}

constexpr auto KEYS_STAGED = key_stages();
constexpr auto VALUES_STAGED = value_stages();

// Vector S of a staged row; nothing is read behind the end of the row.
template <int S, class Side, int STAGES>
INLINE __m512i stage(const Stages<Side, STAGES>& stages, const uint8_t* row) {
    __m512i out = {};
    UNROLL(8) for (int pair = 0; pair < Stages<Side, STAGES>::PAIRS; pair++) {
        if (stages.mask[S][pair] == 0) continue;
        __m512i bytes[2];
        UNROLL(2) for (int i = 0; i < 2; i++) {
            const int from = 128 * pair + 64 * i, left = std::clamp(Side::BYTES - from, 0, 64);
            if (left == 64) bytes[i] = _mm512_loadu_si512(row + from);
            else bytes[i] = left ? _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - left), row + from) : __m512i{};
        }
        const __m512i index = _mm512_load_si512(stages.index[S][pair]);
        out |= _mm512_maskz_permutex2var_epi8(stages.mask[S][pair], bytes[0], index, bytes[1]);
    }
    return out;
}

// x[i] = dwords of token i  ->  x[i] = dword i of 16 tokens
INLINE void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    UNROLL(4) for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    UNROLL(4) for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// Bytes of token i  ->  out[i]: of each 16 bytes of the tokens 4 i ... 4 i + 3, a dword for each with the four tokens
INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd), out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(high_ab, high_cd), out[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

constexpr int byte_mask(int plane, int to) { return int(0x01010101u * (((1u << plane) - 1) << to)); }

// The part of a plane of codes which begins at bit FROM of each byte, moved to bit TO.
template <int PLANE, int TO, int FROM>
INLINE __m512i plane_bits(__m512i x) {
    if constexpr (PLANE == 8) return x;
    if constexpr (TO != FROM) x = _mm512_rol_epi32(x, (TO - FROM) & 31);
    return (__m512i)((Ints16)x & byte_mask(PLANE, TO));
}

// The same where it begins at another bit in each lane.
template <int PLANE, int TO, class From>
INLINE __m512i plane_bits(__m512i x, From from) {
    if constexpr (PLANE == 8) return x;
    const __m512i turned = _mm512_rolv_epi32(x, (__m512i)((TO - (Ints16{} + from)) & 31));
    return (__m512i)((Ints16)turned & byte_mask(PLANE, TO));
}

// 16 tokens of keys: their staged rows -> codes [vectors of 4 channels], and float16 channels as floats.
INLINE void unpack_keys(const uint8_t* const* rows, __m512i* codes, float* halves, int64_t halves_stride) {
    __m512i x[KEY_STAGES + 1][16];
    each<KEY_STAGES>([&](auto s) {
        __m512i dwords[16];
        UNROLL(16) for (int t = 0; t < 16; t++) dwords[t] = stage<decltype(s)::value>(KEYS_STAGED, rows[t]);
        transpose(dwords);
        UNROLL(16) for (int i = 0; i < 16; i++) x[s][i] = dwords[i];
    });
    const __m512i* planes = x[0];
    each<KEY_LAYOUT.count>([&](auto q) {
        constexpr Quad quad = KEY_LAYOUT.quads[decltype(q)::value];
        each<8>([&](auto channel) {
            constexpr int k = decltype(channel)::value;
            __m512i code = {};
            const __m512i* from = planes;
            each_plane([&](auto p) {
                constexpr int plane = decltype(p)::value;
                if constexpr ((quad.planes & plane) != 0) {
                    code |= plane_bits<plane, quad.place(plane), k * plane % 8>(from[k * plane / 8]);
                    from += plane;
                }
            });
            _mm512_store_si512(codes + q * 8 + k, code);
        });
        planes += quad.planes;
    });
    for (int i = 0; i < KEY_LAYOUT.halves; i += 2, planes++) {
        const __m512i odd = _mm512_srli_epi32(*planes, 16);
        _mm512_store_ps(halves + i * halves_stride, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(*planes)));
        _mm512_store_ps(halves + (i + 1) * halves_stride, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd)));
    }
}

// 4 tokens of values -> codes [vectors of 16 channels].
INLINE void unpack_values(const uint8_t* const* rows, __m512i* codes) {
    __m512i mixed[4 * VALUE_STAGES + 1];
    each<VALUE_STAGES>([&](auto s) {
        __m512i x[4];
        UNROLL(4) for (int t = 0; t < 4; t++) x[t] = stage<decltype(s)::value>(VALUES_STAGED, rows[t]);
        interleave(x[0], x[1], x[2], x[3], mixed + 4 * s);
    });
    const __m512i* planes = mixed;
    each<VALUE_LAYOUT.count>([&](auto q) {
        constexpr Quad quad = VALUE_LAYOUT.quads[decltype(q)::value];
        each<2>([&](auto odd) {
            constexpr int k = decltype(odd)::value;
            constexpr Ints16 channels = {k,     k,     k,     k,     k + 2, k + 2, k + 2, k + 2,
                                         k + 4, k + 4, k + 4, k + 4, k + 6, k + 6, k + 6, k + 6};
            __m512i code = {};
            const __m512i* from = planes;
            each_plane([&](auto p) {
                constexpr int plane = decltype(p)::value;
                if constexpr ((quad.planes & plane) != 0) {
                    code |= plane_bits<plane, quad.place(plane)>(from[plane == 8 ? k : 0], channels * plane & 7);
                    from += value_vectors(plane);
                }
            });
            _mm512_store_si512(codes + q * 2 + k, code);
        });
        planes += value_vectors(quad.planes);
    });
}

constexpr int MOST_BYTE_ROWS = 9;  // 27 sums of 3 parts: as many as registers hold beside codes

// Vectors at once: enough sums to keep the multipliers busy, no more than registers hold.
constexpr int vectors_for(int rows, int parts) { return std::clamp(24 / (rows * parts), 1, 4); }

// To each of 16 sums, four bytes of codes times four signed bytes, which are the same for all. As an instruction of its
// own: given the intrinsic, GCC copies each sum back and forth.
INLINE __m512i add_products(__m512i sum, __m512i codes, const int32_t& factor) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(factor));
    return sum;
}

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], STEP and NEXT vectors from one i or v to the next.
template <int ROWS, int VECTORS, int PARTS, int STEP, int NEXT, int COUNT>
INLINE void multiply(const __m512i* codes, const int32_t* factors, int count, __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(9) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * STEP + v * NEXT);
        UNROLL(9) for (int r = 0; r < ROWS; r++) {
            UNROLL(3) for (int part = 0; part < PARTS; part++) {
                const int32_t& factor = factors[(3 * r + part) * COUNT + i];
                UNROLL(4) for (int v = 0; v < VECTORS; v++) {
                    sums[r][v][part] = add_products(sums[r][v][part], z[v], factor);
                }
            }
        }
    }
}

template <int PARTS>
INLINE Floats16 joined(const __m512i (&parts)[PARTS]) {
    Floats16 sum = __builtin_convertvector((Ints16)parts[PARTS - 1], Floats16);
    UNROLL(2) for (int i = PARTS - 2; i >= 0; i--) {
        sum = sum * 256.0f + __builtin_convertvector((Ints16)parts[i], Floats16);
    }
    return sum;
}

// The largest integer that PARTS signed bytes make is a little more.
constexpr float largest_integer(int parts) { return parts == 3 ? 8355000.0f : 32600.0f; }

// 16 integers as PARTS times 16 signed bytes: digits of base 256.
template <int PARTS>
INLINE void store_parts(Ints16 x, int8_t* out, int64_t stride) {
    constexpr int half = PARTS == 3 ? 0x808080 : 0x8080;
    const __m512i digits = (__m512i)((x + half) ^ half);
    UNROLL(3) for (int i = 0; i < PARTS; i++) {
        _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8 * i)));
    }
}

// A query of floats in the order of channels -> its parts, [3, KEY_VECTORS, 4], and what one stands for. `middle` is
// what the middle of all codes adds to a logit.
void to_parts(const float* query, int8_t* parts, float& unit, float& middle) {
    alignas(64) float q[4 * KEY_VECTORS + 1] = {}, middles[4 * KEY_VECTORS + 1] = {};
    float largest = 0, none = 0;
    for (int i = 0; i < KEY_LAYOUT.count; i++) {
        const Quad& quad = KEY_LAYOUT.quads[i];
        for (int g = 0; g < quad.size; g++) {
            const float factor = 1.0f / float(1 << quad.shift(quad.groups[g].bits));
            for (int k = 0; k < 8; k++) {
                const int channel = quad.groups[g].channel + k, to = (8 * i + k) * 4 + g;
                q[to] = query[channel] * factor;
                middles[to] = KEY_CHANNELS.middle[channel] / factor;
                largest = std::max(largest, std::abs(q[to]));
                none += q[to] * 0.0f;  // NaN stays NaN
            }
        }
    }
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    Floats sum = {};
    for (int i = 0; i < 4 * KEY_VECTORS; i += 16) {
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(q + i) * inverse));
        store_parts<3>(x, parts + i, 4 * KEY_VECTORS);
        sum += __builtin_convertvector(x, Floats16) * load(middles + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit;
}

// Weights of a tile have two parts where the largest is at most 1/SMALL of all so far: rounding to 2^-16 of it then
// moves the output by about 2^-16 / SMALL * sqrt(TILE) of a latent. Where it counts for more, they have three.
constexpr float SMALL = 256;

// Where 16 tokens of a tile are, from t on, the last one again behind the end; and their scales.
template <class Side>
INLINE void rows_of(const Rows& rows, const Rows& scales, const Part& p, int64_t j, int64_t begin, int t, int tokens,
                    const uint8_t** z, Scratch& s) {
    const int64_t token = p.listed.at(begin + t);
    const uint8_t* row = rows.at<uint8_t>(p.b, j, token);
    const uint8_t* ahead = rows.at<uint8_t>(p.b, j, p.listed.ahead(begin + t, AHEAD<Side>));
    const int last = std::min(tokens - t, 16) - 1;
    UNROLL(16) for (int i = 0; i < 16; i++) {
        z[i] = row + i * rows.token;
        UNROLL(4) for (int byte = 0; byte < Side::BYTES; byte += 64) {
            __builtin_prefetch(ahead + i * rows.token + byte, 0, 2);
        }
    }
    for (int i = last + 1; i < 16; i++) z[i] = z[last];
    const uint16_t* scale = scales.at<uint16_t>(p.b, j, token);
    if (scales.token == 1) {
        const __m512i dense = _mm512_maskz_loadu_epi16((2u << last) - 1, scale);
        _mm512_store_ps(s.scale + t, _mm512_cvtph_ps(_mm512_castsi512_si256(dense)));
    } else {
        for (int i = 0; i <= last; i++) s.scale[t + i] = from_float16(scale[i * scales.token]);
    }
}

// Logits without the lowest of the three digits of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * KEY_VECTORS;
    multiply<ROWS, VECTORS, 2, 1, KEY_VECTORS, KEY_VECTORS>(codes, query, KEY_VECTORS, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(9) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (joined(sums[r][v]) * unit - s.middle[row + r]) * load(s.scale + t + 16 * v);
        }
    }
    UNROLL(1) for (int i = 0; i < KEY_LAYOUT.halves; i++) {
        const float* q = s.query + row * Keys::PAD + KEY_LAYOUT.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(9) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * Keys::PAD] * half;
        }
    }
    UNROLL(9) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) store(s.logits + (row + r) * TILE + t + 16 * v, x[r][v]);
    }
}

// What the lowest digit adds to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][1];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * KEY_VECTORS;
    multiply<ROWS, VECTORS, 1, 1, KEY_VECTORS, KEY_VECTORS>(codes, query, KEY_VECTORS, sums);
    UNROLL(9) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 16 * v;
            store(x, load(x) + joined(sums[r][v]) * s.unit[row + r] * load(s.scale + t + 16 * v));
        }
    }
}

template <int ROWS, int VECTORS, class F>
INLINE void for_vectors(int whole, F f) {
    int t = 0;
    for (; t + 16 * VECTORS <= whole; t += 16 * VECTORS) f(t, std::integral_constant<int, VECTORS>());
    for (; t < whole; t += 16) f(t, std::integral_constant<int, 1>());
}

// The lowest digit counts where a weight may be more than 1/MINOR of all so far: without it a logit is off by some
// 2^-15 of what its largest products are, and the output by that times the root of the largest weight.
constexpr float MINOR = 1024;

bool is_minor(const Arguments& a, int64_t row, int rows, int whole, const Scratch& s) {
    if (SOFTCAP || a.mask_kind == ADDITIVE_MASK) return false;  // logits are not yet what the softmax sees
    for (int64_t r = row; r < row + rows; r++) {
        const float* x = s.logits + r * TILE;
        Floats top = load(x);
        for (int t = 16; t < whole; t += 16) top = load(x + t) > top ? load(x + t) : top;
        const State& state = s.states[r];
        if (!(std::exp2(largest_of(top) - state.top) * MINOR <= state.total)) return false;
    }
    return true;
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const int whole = whole_vectors(tokens);
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, a.key_scale, p, j, begin, t, tokens, z, s);
        unpack_keys(z, codes + t / 16 * KEY_VECTORS, s.halves + t, TILE);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
        if (is_minor(a, row + first, ROWS, whole, s)) return;
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            score_low<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
    });
}

// Weights of a tile of values times the tokens' scales, split into as many parts as is returned.
template <int ROWS>
INLINE int scale_and_split(int64_t row, int whole, float* unit, float* total, Scratch& s) {
    float largest[ROWS];
    bool small = true;
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        float* w = s.logits + (row + r) * TILE;
        Floats top = {}, sum = {};
        for (int t = 0; t < whole; t += 16) {
            const Floats scaled = load(w + t) * load(s.scale + t);
            store(w + t, scaled);
            sum += scaled;
            top = scaled > top ? scaled : top;
        }
        State& state = s.states[row + r];
        state.mass += sum_of(sum);
        largest[r] = largest_of(top);
        small &= largest[r] * SMALL <= state.mass;
    }
    UNROLL(1) for (int r = 0; r < ROWS; r++) {
        const float limit = largest_integer(small ? 2 : 3);
        const float inverse = largest[r] > 1e-30f ? limit / largest[r] : 0.0f;
        Ints16 sum = {};
        for (int t = 0; t < whole; t += 16) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(s.logits + (row + r) * TILE + t) * inverse));
            sum += x;
            if (small) store_parts<2>(x, s.weights + 3 * r * TILE + t, TILE);
            else store_parts<3>(x, s.weights + 3 * r * TILE + t, TILE);
        }
        unit[r] = largest[r] / limit;
        total[r] = float(_mm512_reduce_add_epi32((__m512i)sum));
    }
    return small ? 2 : 3;
}

template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const float* unit, const float* total, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    multiply<ROWS, VECTORS, PARTS, VALUE_VECTORS, 1, TILE / 4>(
        codes, reinterpret_cast<const int32_t*>(s.weights), count, sums);
    UNROLL(9) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const int c = 16 * (vector + v);
            const Floats16 x = joined(sums[r][v]) - total[r] * load(VALUE_CHANNELS.middle + c);
            store(states[r].sum + c, load(states[r].sum + c) + unit[r] * x);
        }
    }
}

template <int ROWS, int PARTS>
void mix_block(int count, const float* unit, const float* total, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS), REST = VALUE_VECTORS % VECTORS, WHOLE = VALUE_VECTORS - REST;
    for (int v = 0; v < WHOLE; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, unit, total, states, s);
    if constexpr (REST > 0) mix_bytes<ROWS, REST, PARTS>(WHOLE, count, unit, total, states, s);
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Values>(a.value, a.value_scale, p, j, begin, t, tokens, z, s);
        for (int i = 0; i < 16; i += 4) unpack_values(z + i, codes + (t + i) / 4 * VALUE_VECTORS);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        float unit[ROWS], total[ROWS];
        State* states = s.states + row + first;
        const int parts = scale_and_split<ROWS>(row + first, whole, unit, total, s);
        if (parts == 2) mix_block<ROWS, 2>(whole / 4, unit, total, states, s);
        else mix_block<ROWS, 3>(whole / 4, unit, total, states, s);
    });
}

#else

template <class... T>
void score_codes(const T&...) {}
template <class... T>
void mix_codes(const T&...) {}
template <class... T>
void to_parts(const T&...) {}

#endif
"""
