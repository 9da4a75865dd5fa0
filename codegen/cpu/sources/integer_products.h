//: Scores and mixes of quantized values as bytes, with AVX-512 VNNI. Part of attention.cpp, behind byte_layout.h.
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

// How 64 codes of a row come to 64 bytes. `source`: the byte of the row, -1 for none, that each byte of eight is; of
// these eight bytes each code then takes the bits from `from` on that `keep` keeps, of its first and second plane.
struct Slice {
    int source[64];
    alignas(64) uint8_t from[2][64], keep[2][64];

    constexpr Slice() : source(), from(), keep() {
        for (int& byte : source) byte = -1;
    }
    constexpr int slot(int to, int byte) {  // of a byte of the row among the eight around `to`
        int i = to / 8 * 8;
        while (source[i] >= 0 && source[i] != byte) i++;
        source[i] = byte;
        return i % 8;
    }
    constexpr void put(int to, int plane, int bits, int bit, int shift) {
        if (bits == 0) return;
        from[plane][to] = uint8_t((8 * slot(to, bit / 8) + bit % 8 - shift) & 63);
        keep[plane][to] = uint8_t(((1 << bits) - 1) << shift);
    }
    constexpr void put(int to, Code code) {
        put(to, 0, code.high, code.high_bit, code.shift() + code.low);
        put(to, 1, code.low, code.low_bit, code.shift());
    }
    constexpr bool has_low() const {
        // clang-format off
        for (int mask : keep[1]) if (mask) return true;
        return false;
    }
    constexpr bool is_whole() const {  // bytes are codes
        for (int i = 0; i < 64; i++) if (keep[0][i] && (keep[0][i] != 255 || from[0][i] != 8 * (i % 8))) return false;
        // clang-format on
        return true;
    }
};

constexpr int slices_for(int bytes) { return (bytes + 63) / 64; }

template <class Side, int SLICES>
struct Apart {
    static constexpr int BYTES = Side::BYTES, BLOCKS = slices_for(BYTES);
    Slice slices[SLICES + 1];
    alignas(64) uint8_t index[SLICES + 1][BLOCKS][64] = {};  // which byte of a block of the row goes where
    uint64_t mask[SLICES + 1][BLOCKS] = {};

    constexpr void settle() {
        for (int s = 0; s < SLICES; s++) {
            for (int to = 0; to < 64; to++) {
                const int byte = slices[s].source[to];
                if (byte < 0) continue;
                index[s][byte / 64][to] = uint8_t(byte % 64);
                mask[s][byte / 64] |= uint64_t(1) << to;
            }
        }
    }
    constexpr int blocks(int slice) const {  // that a slice needs
        int count = 0;
        for (uint64_t m : mask[slice]) count += m != 0;
        return count;
    }
    constexpr bool stays(int slice, int block) const {  // bytes are where they should be
        // clang-format off
        for (int to = 0; to < 64; to++) if (mask[slice][block] >> to & 1 && index[slice][block][to] != to) return false;
        // clang-format on
        return true;
    }
};

// Keys: byte i of a slice is its channel i, so that a dword has four channels.
constexpr auto keys_apart() {
    Apart<Keys, slices_for(KEY_LAYOUT.count)> apart;
    for (int i = 0; i < KEY_LAYOUT.count; i++) apart.slices[i / 64].put(i % 64, KEY_LAYOUT.codes[i]);
    apart.settle();
    return apart;
}

// Values: where `interleave` makes vectors of 16 channels of them.
constexpr auto values_apart() {
    Apart<Values, slices_for(VALUE_LAYOUT.count)> apart;
    for (int i = 0; i < VALUE_LAYOUT.count; i++) {
        apart.slices[i / 64].put(i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4, VALUE_LAYOUT.codes[i]);
    }
    apart.settle();
    return apart;
}

// Float16 channels of keys, 32 to a slice.
constexpr auto halves_apart() {
    Apart<Keys, slices_for(2 * KEY_LAYOUT.halves)> apart;
    for (int i = 0; i < 2 * KEY_LAYOUT.halves; i++) {
        apart.slices[i / 64].source[i % 64] = KEY_LAYOUT.half_byte[i / 2] + i % 2;
    }
    apart.settle();
    return apart;
}

constexpr auto KEYS_APART = keys_apart();
constexpr auto VALUES_APART = values_apart();
constexpr auto HALVES_APART = halves_apart();

// The bytes of slice S of a row; nothing is read behind the end of the row, and what no code needs is arbitrary.
template <const auto& APART, int S>
INLINE __m512i bytes_of(const uint8_t* row) {
    __m512i out = {};
    each<APART.BLOCKS>([&](auto b) {
        constexpr int B = decltype(b)::value, LEFT = std::min(APART.BYTES - 64 * B, 64);
        if constexpr (APART.mask[S][B] != 0) {
            constexpr bool ALONE = APART.blocks(S) == 1;
            __m512i bytes = LEFT == 64 ? _mm512_loadu_si512(row + 64 * B)
                                       : _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - LEFT), row + 64 * B);
            const __m512i index = _mm512_load_si512(APART.index[S][B]);
            if constexpr (ALONE && !APART.stays(S, B)) bytes = _mm512_permutexvar_epi8(index, bytes);
            if constexpr (!ALONE) bytes = _mm512_maskz_permutexvar_epi8(APART.mask[S][B], index, bytes);
            out |= bytes;
        }
    });
    return out;
}

// The codes of slice S of a row.
template <const auto& APART, int S>
INLINE __m512i codes_of(const uint8_t* row) {
    constexpr const Slice& slice = APART.slices[S];
    constexpr bool IS_WHOLE = slice.is_whole(), HAS_LOW = slice.has_low();
    const __m512i bytes = bytes_of<APART, S>(row);
    if constexpr (IS_WHOLE) return bytes;
    const __m512i high = _mm512_multishift_epi64_epi8(_mm512_load_si512(slice.from[0]), bytes);
    const __m512i kept = high & _mm512_load_si512(slice.keep[0]);
    if constexpr (!HAS_LOW) return kept;
    const __m512i low = _mm512_multishift_epi64_epi8(_mm512_load_si512(slice.from[1]), bytes);
    return kept | (low & _mm512_load_si512(slice.keep[1]));
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

// 16 tokens of keys -> codes [vectors of 4 channels].
INLINE void unpack_keys(const uint8_t* const* rows, __m512i* codes) {
    each<slices_for(KEY_LAYOUT.count)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(KEY_VECTORS - 16 * S, 16);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = codes_of<KEYS_APART, S>(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < COUNT; i++) _mm512_store_si512(codes + 16 * S + i, x[i]);
    });
}

// Their float16 channels as floats [channels, TILE].
INLINE void unpack_halves(const uint8_t* const* rows, float* halves) {
    each<slices_for(2 * KEY_LAYOUT.halves)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(KEY_LAYOUT.halves / 2 - 16 * S, 16);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = bytes_of<HALVES_APART, S>(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < COUNT; i++) {
            float* out = halves + (32 * S + 2 * i) * TILE;
            _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[i])));
            _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16))));
        }
    });
}

// 4 tokens of values -> codes of slice S, [4 vectors of 16 channels].
template <int S>
INLINE void unpack_slice(const uint8_t* const* rows, __m512i* codes) {
    __m512i x[4];
    UNROLL(4) for (int t = 0; t < 4; t++) x[t] = codes_of<VALUES_APART, S>(rows[t]);
    interleave(x[0], x[1], x[2], x[3], codes);
}

// 4 tokens of values -> codes [vectors of 16 channels].
INLINE void unpack_values(const uint8_t* const* rows, __m512i* codes) {
    each<slices_for(VALUE_LAYOUT.count)>([&](auto s) {
        constexpr int S = decltype(s)::value, COUNT = std::min(VALUE_VECTORS - 4 * S, 4);
        __m512i mixed[4];
        unpack_slice<S>(rows, mixed);
        UNROLL(4) for (int i = 0; i < COUNT; i++) _mm512_store_si512(codes + 4 * S + i, mixed[i]);
    });
}

constexpr int MOST_BYTE_ROWS = 5;  // 15 sums of 3 parts; with more rows at once only the compiler has more to do

// Vectors at once: enough sums to keep the multipliers busy, no more than registers hold.
constexpr int vectors_for(int rows, int parts) { return std::clamp(24 / (rows * parts), 1, 4); }

// To each of 16 sums, four bytes of codes times four signed bytes, which are the same for all. As an instruction of its
// own: given the intrinsic, GCC copies each sum back and forth.
INLINE __m512i add_products(__m512i sum, __m512i codes, const int32_t& factor) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(factor));
    return sum;
}

INLINE __m512i add_products(__m512i sum, __m512i codes, __m512i factors) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(factors));
    return sum;
}

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], STEP and NEXT vectors from one i or v to the next.
template <int ROWS, int VECTORS, int PARTS, int STEP, int NEXT, int COUNT>
INLINE void multiply(const __m512i* codes, const int32_t* factors, int count, __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * STEP + v * NEXT);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
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

// A query of floats in the order of channels -> its parts, [3, KEY_DWORDS, 4], and what one stands for. `middle` is
// what the middle of all codes adds to a logit.
void to_parts(const float* query, int8_t* parts, float& unit, float& middle) {
    alignas(64) float q[4 * KEY_DWORDS + 1] = {}, middles[4 * KEY_DWORDS + 1] = {};
    float largest = 0, none = 0;
    for (int i = 0; i < KEY_LAYOUT.count; i++) {
        const Code& code = KEY_LAYOUT.codes[i];
        const float factor = float(1 << code.shift());
        q[i] = query[code.channel] / factor;
        middles[i] = KEY_CHANNELS.middle[code.channel] * factor;
        largest = std::max(largest, std::abs(q[i]));
        none += q[i] * 0.0f;  // NaN stays NaN
    }
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    Floats sum = {};
    for (int i = 0; i < 4 * KEY_DWORDS; i += 16) {
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(q + i) * inverse));
        store_parts<3>(x, parts + i, 4 * KEY_DWORDS);
        sum += __builtin_convertvector(x, Floats16) * load(middles + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit;
}

// Weights of a tile have two parts where the largest is at most 1/SMALL of all so far: rounding to 2^-16 of it then
// moves the output by about 2^-16 / SMALL * sqrt(TILE) of a latent. Where it counts for more, they have three.
constexpr float SMALL = 256;

// Where 16 tokens of a tile are, from t on, the last one again behind the end. What comes later is fetched.
template <class Side>
INLINE void rows_of(const Rows& rows, const Part& p, int64_t j, int64_t begin, int t, int tokens, const uint8_t** z) {
    const int last = std::min(tokens - t, 16) - 1;
    UNROLL(2) for (int run = 0; run < 16; run += SIDE_BY_SIDE) {
        const int64_t from = begin + t + (run <= last ? run : 0);  // no list says where tokens behind the end are
        const uint8_t* row = rows.at<uint8_t>(p.b, j, p.listed.at(from));
        const uint8_t* ahead = rows.at<uint8_t>(p.b, j, p.listed.ahead(from, AHEAD<Side>));
        UNROLL(8) for (int i = 0; i < SIDE_BY_SIDE; i++) {
            z[run + i] = row + i * rows.token;
            UNROLL(4) for (int byte = 0; byte < Side::BYTES; byte += 64) {
                __builtin_prefetch(ahead + i * rows.token + byte, 0, 2);
            }
        }
    }
    for (int i = last + 1; i < 16; i++) z[i] = z[last];
}

// The scales of a tile as floats. Those of later pages are fetched: nothing else foresees where they are.
template <class Side>
INLINE void load_scales(const Rows& scales, const Part& p, int64_t j, int64_t begin, int tokens, Scratch& s) {
    _mm512_store_ps(s.scale + whole_vectors(tokens) - 16, _mm512_setzero_ps());  // weights of no token are 0 times it
    for (int t = 0; t < tokens; t += SIDE_BY_SIDE) {
        const uint16_t* scale = scales.at<uint16_t>(p.b, j, p.listed.at(begin + t));
        __builtin_prefetch(scales.at<uint16_t>(p.b, j, p.listed.ahead(begin + t, AHEAD<Side>)), 0, 2);
        const int last = std::min(tokens - t, SIDE_BY_SIDE) - 1;
        if (scales.token == 1) {
            const __m128i dense = _mm_maskz_loadu_epi16((2u << last) - 1, scale);
            _mm256_store_ps(s.scale + t, _mm256_cvtph_ps(dense));
        } else {
            for (int i = 0; i <= last; i++) s.scale[t + i] = from_float16(scale[i * scales.token]);
        }
    }
}

// Logits without the lowest of the three digits of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * KEY_DWORDS;
    multiply<ROWS, VECTORS, 2, 1, KEY_VECTORS, KEY_DWORDS>(codes, query, KEY_VECTORS, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (joined(sums[r][v]) * unit - s.middle[row + r]) * load(s.scale + t + 16 * v);
        }
    }
    UNROLL(1) for (int i = 0; i < KEY_LAYOUT.halves; i++) {
        const float* q = s.query + row * Keys::PAD + KEY_LAYOUT.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(5) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * Keys::PAD] * half;
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) store(s.logits + (row + r) * TILE + t + 16 * v, x[r][v]);
    }
}

// What the lowest digit adds to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, Scratch& s) {
    __m512i sums[ROWS][VECTORS][1];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * KEY_VECTORS;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * KEY_DWORDS;
    multiply<ROWS, VECTORS, 1, 1, KEY_VECTORS, KEY_DWORDS>(codes, query, KEY_VECTORS, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
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

// Sums of 16 vectors: those of four and four, then of the quarters that are left.
INLINE Floats16 sums_of_4(const Floats16 (&x)[4]) {
    const __m512 ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)) + _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
}

INLINE Floats16 sums_of_quarters(Floats16 x, Floats16 y) {
    return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd);
}

// PARTS digits of the query of one row, from `parts` on, times the codes of 16 tokens as they lie in their rows.
template <int PARTS>
INLINE Floats16 products_of_row(const uint8_t* const* rows, const int8_t* parts) {
    Floats16 fours[4];
    UNROLL(4) for (int i = 0; i < 4; i++) {
        Floats16 x[4];
        UNROLL(4) for (int t = 0; t < 4; t++) {
            __m512i sums[PARTS] = {};
            each<slices_for(KEY_LAYOUT.count)>([&](auto s) {
                constexpr int S = decltype(s)::value;
                const __m512i codes = codes_of<KEYS_APART, S>(rows[4 * i + t]);
                UNROLL(2) for (int part = 0; part < PARTS; part++) {
                    const __m512i query = _mm512_loadu_si512(parts + part * 4 * KEY_DWORDS + 64 * S);
                    sums[part] = add_products(sums[part], codes, query);
                }
            });
            x[t] = joined(sums);
        }
        fours[i] = sums_of_4(x);
    }
    return sums_of_quarters(sums_of_quarters(fours[0], fours[1]), sums_of_quarters(fours[2], fours[3]));
}

// Logits of a tile of keys for one row.
void score_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, Scratch& s) {
    const int whole = whole_vectors(tokens);
    const int8_t* parts = s.parts + row * 12 * KEY_DWORDS;
    float* logits = s.logits + row * TILE;
    const float unit = s.unit[row];
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        const Floats16 high = products_of_row<2>(z, parts + 4 * KEY_DWORDS);
        Floats16 x = (high * (unit * 256.0f) - s.middle[row]) * load(s.scale + t);
        unpack_halves(z, s.halves + t);
        for (int i = 0; i < KEY_LAYOUT.halves; i++) {
            x += s.query[row * Keys::PAD + KEY_LAYOUT.half_channel[i]] * load(s.halves + i * TILE + t);
        }
        store(logits + t, x);
    }
    if (is_minor(a, row, 1, whole, s)) return;
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        store(logits + t, load(logits + t) + products_of_row<1>(z, parts) * unit * load(s.scale + t));
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    load_scales<Keys>(a.key_scale, p, j, begin, tokens, s);
    if (rows == 1) return score_row(a, p, j, begin, tokens, row, s);
    const int whole = whole_vectors(tokens);
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Keys>(a.key, p, j, begin, t, tokens, z);
        unpack_keys(z, codes + t / 16 * KEY_VECTORS);
        unpack_halves(z, s.halves + t);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        // clang-format off
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
        if (is_minor(a, row + first, ROWS, whole, s)) return;
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            score_low<ROWS, decltype(vectors)::value>(row + first, t, s);
        });
        // clang-format on
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

// Sums of products from vector `vector` on, without the middle of the codes, are added to a state.
template <int VECTORS, int PARTS>
INLINE void add_sums(const __m512i (&sums)[VECTORS][PARTS], int vector, int count, float unit, float total, State& to) {
    UNROLL(4) for (int v = 0; v < VECTORS; v++) {
        if (v >= count) continue;
        float* sum = to.sum + 16 * (vector + v);
        const Floats16 x = joined(sums[v]) - total * load(VALUE_CHANNELS.middle + 16 * (vector + v));
        store(sum, load(sum) + unit * x);
    }
}

template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const float* unit, const float* total, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    // clang-format off
    multiply<ROWS, VECTORS, PARTS, VALUE_VECTORS, 1, TILE / 4>(
        codes, reinterpret_cast<const int32_t*>(s.weights), count, sums);
    // clang-format on
    UNROLL(5) for (int r = 0; r < ROWS; r++) add_sums(sums[r], vector, VECTORS, unit[r], total[r], states[r]);
}

template <int ROWS, int PARTS>
void mix_block(int count, const float* unit, const float* total, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS), REST = VALUE_VECTORS % VECTORS, WHOLE = VALUE_VECTORS - REST;
    for (int v = 0; v < WHOLE; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, unit, total, states, s);
    if constexpr (REST > 0) mix_bytes<ROWS, REST, PARTS>(WHOLE, count, unit, total, states, s);
}

// One row: codes are multiplied as soon as they are there.
template <int PARTS>
void mix_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, float unit, float total,
             State& state, Scratch& s) {
    each<slices_for(VALUE_LAYOUT.count)>([&](auto slice) {
        constexpr int S = decltype(slice)::value, COUNT = std::min(VALUE_VECTORS - 4 * S, 4);
        __m512i sums[4][PARTS] = {};
        for (int t = 0; t < tokens; t += 16) {
            const uint8_t* z[16];
            rows_of<Values>(a.value, p, j, begin, t, tokens, z);
            UNROLL(4) for (int i = 0; i < 16; i += 4) {
                __m512i codes[4];
                unpack_slice<S>(z + i, codes);
                UNROLL(3) for (int part = 0; part < PARTS; part++) {
                    const int32_t& weight = *reinterpret_cast<const int32_t*>(s.weights + part * TILE + t + i);
                    UNROLL(4) for (int v = 0; v < COUNT; v++) {
                        sums[v][part] = add_products(sums[v][part], codes[v], weight);
                    }
                }
            }
        }
        add_sums(sums, 4 * S, COUNT, unit, total, state);
    });
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    load_scales<Values>(a.value_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        float unit, total;
        const int parts = scale_and_split<1>(row, whole, &unit, &total, s);
        if (parts == 2) mix_row<2>(a, p, j, begin, tokens, unit, total, s.states[row], s);
        else mix_row<3>(a, p, j, begin, tokens, unit, total, s.states[row], s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const uint8_t* z[16];
        rows_of<Values>(a.value, p, j, begin, t, tokens, z);
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
