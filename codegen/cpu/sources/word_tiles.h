//: Scores and mixes of quantized values as words of 16 bits, with AVX2. Part of attention.cpp, behind quantized_rows.h.
// ------------------------------------------------------------------------------------------------ products of words

#if WORDS

// To each of 8 sums, two words of codes times two others. As instructions of their own: given intrinsics, GCC keeps
// some of the sums in memory.
INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i factors) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(factors));
    return sum;
#else
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(factors));
    return sum;
#endif
}

INLINE __m256i load_words(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// 16 bytes of two rows.
INLINE __m256i two_rows(const uint8_t* a, const uint8_t* b) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// 16 bytes of 8 rows -> out[i]: dword i of each.
INLINE void transpose_dwords(const uint8_t* rows, int64_t stride, __m256i* out) {
    __m256i x[4];
    UNROLL(4) for (int i = 0; i < 4; i++) x[i] = two_rows(rows + i * stride, rows + (i + 4) * stride);
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
}

// 16 bytes of 16 rows -> out[i]: word i of each, `step` vectors from one to the next.
INLINE void transpose_words(const Sixteen& rows, int offset, int64_t step, __m256i* out) {
    __m256i x[8], y[8];
    UNROLL(8) for (int i = 0; i < 8; i++) x[i] = two_rows(rows[i] + offset, rows[i + 8] + offset);
    UNROLL(4) for (int i = 0; i < 4; i++) {
        y[i] = _mm256_unpacklo_epi16(x[2 * i], x[2 * i + 1]), y[i + 4] = _mm256_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    UNROLL(2) for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(y[i], y[i + 1]), b = _mm256_unpackhi_epi32(y[i], y[i + 1]);
        const __m256i c = _mm256_unpacklo_epi32(y[i + 2], y[i + 3]), d = _mm256_unpackhi_epi32(y[i + 2], y[i + 3]);
        _mm256_store_si256(out + i * step, _mm256_unpacklo_epi64(a, c));
        _mm256_store_si256(out + (i + 1) * step, _mm256_unpackhi_epi64(a, c));
        _mm256_store_si256(out + (i + 2) * step, _mm256_unpacklo_epi64(b, d));
        _mm256_store_si256(out + (i + 3) * step, _mm256_unpackhi_epi64(b, d));
    }
}

INLINE __m256i in_both_halves(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
}

// What 32 windows stand for.
INLINE __m256i codes_of_windows(__m256i windows, __m256i levels, __m256i offsets, __m256i order) {
    const __m256i half = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(windows, half), high = _mm256_and_si256(_mm256_srli_epi16(windows, 4), half);
    const __m256i level = _mm256_shuffle_epi8(levels, _mm256_xor_si256(high, _mm256_shuffle_epi8(order, low)));
    return _mm256_add_epi8(level, _mm256_shuffle_epi8(offsets, low));
}

// What a ring stands for in 16 rows, `step` bytes from one to the next.
void look_up(const Ring& ring, const Sixteen& rows, uint8_t* to, int64_t step) {
    const __m256i levels = in_both_halves(LEVELS), offsets = in_both_halves(OFFSETS), order = in_both_halves(ORDER);
    const Spread& its = SPREADS[ring.bits - 1];
    const __m256i first = in_both_halves(its.bytes[0]), second = in_both_halves(its.bytes[1]);
    const __m256i factor = in_both_halves(its.factor[0]), factor_of_second = in_both_halves(its.factor[1]);
    const int last = ring.bits * ring.width / 8 - 1;
    UNROLL(1) for (int t = 0; t < 16; t++, to += step) {
        const uint8_t* row = rows[t] + ring.byte;
        const __m128i begin = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        __m128i low = _mm_insert_epi8(_mm_slli_si128(begin, 1), row[last], 0);
        UNROLL(1) for (int i = 0; i < ring.width; i += 32) {
            const uint8_t* from = row + i / 8 * ring.bits - 1;
            if (i) low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * ring.bits));
            const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            const __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, first), factor);
            const __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, second), factor_of_second);
            const __m256i windows = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            const __m256i codes = codes_of_windows(windows, levels, offsets, order);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), codes);
        }
    }
}

// Rows as they are taken apart: with what their trellis codes stand for, if they have any.
INLINE Sixteen looked_up(const Side& side, const Sixteen& rows, Scratch& s) {
    const int64_t step = side.layout.looked_up;
    if (!step) return rows;
    UNROLL(1) for (int t = 0; t < 16; t++) {
        for (int i = 0; i < side.bytes; i += 32) {
            const auto* from = reinterpret_cast<const __m256i*>(rows[t] + i);
            _mm256_store_si256(reinterpret_cast<__m256i*>(s.looked_up + t * step + i), _mm256_loadu_si256(from));
        }
    }
    for (const Ring& ring : side.layout.rings) look_up(ring, rows, s.looked_up + ring.at, step);
    return {{s.looked_up, s.looked_up + SIDE_BY_SIDE * step}, step};
}

// Words shifted to the left, or with a negative count to the right.
template <int COUNT>
INLINE __m256i shifted(__m256i x) {
    if constexpr (COUNT == 0) return x;
    else if constexpr (COUNT > 0) return _mm256_slli_epi16(x, COUNT);
    else return _mm256_srli_epi16(x, -COUNT);
}

// Code K of each word of `high`, with its lower bits from `low`, at the upper end of a byte.
template <int HIGH, int LOW, int K>
INLINE __m256i code_of(__m256i high, __m256i low) {
    constexpr int TOP = 8 - HIGH, NEXT = TOP - LOW;
    const __m256i code = shifted<TOP - HIGH * K>(high) & _mm256_set1_epi16(((1 << HIGH) - 1) << TOP);
    if constexpr (LOW == 0) return code;
    else return code | (shifted<NEXT - LOW * K>(low) & _mm256_set1_epi16(((1 << LOW) - 1) << NEXT));
}

// Where bytes of both words of four dwords come from: byte `at` of each and the next one, or the same one.
#define SPREAD_BYTES(a, b) {a, 128, b, 128, a + 4, 128, b + 4, 128, a + 8, 128, b + 8, 128, a + 12, 128, b + 12, 128}
alignas(16) constexpr uint8_t SPREAD[2][4][16] = {
    {SPREAD_BYTES(0, 1), SPREAD_BYTES(1, 2), SPREAD_BYTES(2, 3), SPREAD_BYTES(3, 3)},
    {SPREAD_BYTES(0, 0), SPREAD_BYTES(1, 1), SPREAD_BYTES(2, 2), SPREAD_BYTES(3, 3)},
};

// A dword of keys in its form: codes in both words.
template <Form FORM>
INLINE __m256i in_words(__m256i x, int at) {
    if constexpr (FORM == FOUR_BYTES) return x;
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD[FORM == ONE_BYTE][at]));
    x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(bytes));
    if constexpr (FORM == TWO_BYTES) return x;
    return _mm256_blend_epi16(x, _mm256_srli_epi16(x, 4), 0xaa);
}

// Calls f(bits of the first plane, of the second).
template <class F>
INLINE void with_planes(int bits, F f) {
    const auto call = [&](auto high, auto low) { f(high, low); };
    typedef std::integral_constant<int, 0> None;
    typedef std::integral_constant<int, 1> One;
    typedef std::integral_constant<int, 2> Two;
    typedef std::integral_constant<int, 4> Four;
    switch (bits) {
        case 1: return call(One(), None());
        case 2: return call(Two(), None());
        case 3: return call(Two(), One());
        case 4: return call(Four(), None());
        case 5: return call(Four(), One());
        case 6: return call(Four(), Two());
        default: return call(std::integral_constant<int, 8>(), None());
    }
}

// Calls f(K) for K < COUNT as compile-time numbers.
template <class F, int... K>
INLINE void for_each(F f, std::integer_sequence<int, K...>) {
    (f(std::integral_constant<int, K>()), ...);
}

// 16 tokens of keys -> dwords [2, 4 pieces], and halves [channels, TILE] of float16 channels.
INLINE void unpack_keys(const Layout& layout, const Sixteen& rows, __m256i* dwords, float* halves) {
    for (int v = 0; v < 16; v += 8, halves += 8) {
        for (const int piece : layout.pieces) {
            transpose_dwords(rows[v] + piece, rows.stride, dwords);
            dwords += 4;
        }
        float* half = halves;
        for (const int piece : layout.half_pieces) {
            UNROLL(4) for (int i = 0; i < 4; i++, half += 2 * TILE) {
                const __m256i x = load_words(dwords + 4 * (piece - int(layout.pieces.size())) + i);
                const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(x, 16);
                const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
                _mm256_store_ps(half, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
                _mm256_store_ps(half + TILE, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
            }
        }
    }
}

constexpr int MOST_KEY_ROWS = 10, MOST_VALUE_ROWS = 5;  // with sums of all there are registers for codes

constexpr float LARGEST = 32600.0f;  // the largest word, and 1/256 of the largest number that has a byte below

// 16 integers as words, and where `low` is not null as the signed bytes below them.
INLINE void store_words(__m256i a, __m256i b, int16_t* high, int16_t* low) {
    const auto joined = [](__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8); };
    if (low) {
        const __m256i byte = _mm256_set1_epi32(255), half = _mm256_set1_epi32(128);
        const __m256i bytes = joined(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        const __m256i digits = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(low), digits);
        a = _mm256_srai_epi32(_mm256_add_epi32(a, half), 8), b = _mm256_srai_epi32(_mm256_add_epi32(b, half), 8);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), joined(a, b));
}

INLINE __m256 floats_of_words(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

// A query of floats in the order of channels -> its parts, and what one stands for. What the middle of all codes adds
// to a logit: by all digits but the lowest, and by the lowest. All channels have the same digits.
void to_parts(const Kernel& k, const float* query, int, int8_t* to, float& unit, float& middle, float& lowest, float&) {
    const int count = k.key.layout.count(), padded = 2 * k.key_dwords;
    int16_t* parts = reinterpret_cast<int16_t*>(to);
    float largest = 0, none = 0;
    for (int i = 0; i < count; i++) {
        const float q = query[k.key.layout.codes[i].channel] * k.key_factor[i];
        largest = std::max(largest, std::abs(q));
        none += q * 0.0f;  // NaN stays NaN
    }
    const float inverse = largest > 1e-30f ? 256 * LARGEST / largest : 0.0f;
    __m256 sum = {}, low = {};
    for (int i = 0; i < padded; i += 16) {
        alignas(32) float q[16] = {};
        for (int n = 0; n < std::min(count - i, 16); n++) {
            q[n] = query[k.key.layout.codes[i + n].channel] * k.key_factor[i + n] * inverse;
        }
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(q)), b = _mm256_cvtps_epi32(_mm256_load_ps(q + 8));
        store_words(a, b, parts + padded + i, parts + i);
        for (int n = i; n < i + 16; n += 8) {
            sum += floats_of_words(parts + padded + n) * _mm256_loadu_ps(k.key_middle.data() + n);
            low += floats_of_words(parts + n) * _mm256_loadu_ps(k.key_middle.data() + n);
        }
    }
    unit = largest / (256 * LARGEST) + none;
    middle = sum_of(sum) * unit * 256;
    lowest = sum_of(low) * unit;
}

// Parts of queries of `rows` rows from `row` on, [2, pairs] of each -> [2, pairs, ROWS] of each block of them.
void arrange_queries(const Arguments&, int64_t row, int rows, Scratch& s) {
    const Kernel& k = s.kernel;
    const int64_t dwords = k.key_dwords;
    const auto* from = reinterpret_cast<const int32_t*>(s.parts) + 2 * (s.rows + row) * dwords;
    for_blocks_of_rows<MOST_KEY_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        auto* to = reinterpret_cast<int32_t*>(s.parts) + 2 * (row + first) * dwords;
        for (int r = 0; r < ROWS; r++, from += 2 * dwords) {
            for (int i = 0; i < 2 * dwords; i++) to[i * ROWS + r] = from[i];
        }
    });
}

// Tokens of keys at once: 8 for each vector, as many as there are registers for sums.
constexpr int vectors_of_keys(int rows) { return rows <= 4 ? 2 : 1; }

// Adds the codes of a run of keys times a part of queries [pairs, ROWS] to sums.
template <Form FORM, int HIGH, int LOW, int ROWS, int VECTORS>
INLINE void add_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                    __m256i (&to)[ROWS][VECTORS]) {
    constexpr int COUNT = 16 / HIGH >> int(FORM);
    constexpr Form LOWER = LOW == 0 ? FOUR_BYTES : COUNT * LOW == 8 ? TWO_BYTES : ONE_BYTE;
    __m256i sums[ROWS][VECTORS];
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = to[r][v];
    UNROLL(1) for (const Group& g : run.groups) {
        __m256i high[VECTORS], low[VECTORS];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            high[v] = in_words<FORM>(load_words(dwords + v * lanes + g.high), g.high_at);
            low[v] = LOW ? in_words<LOWER>(load_words(dwords + v * lanes + g.low), g.low_at) : high[v];
        }
        for_each(
            [&](auto k) {
                constexpr int K = decltype(k)::value;
                __m256i codes[VECTORS];
                UNROLL(2) for (int v = 0; v < VECTORS; v++) codes[v] = code_of<HIGH, LOW, K>(high[v], low[v]);
                UNROLL(10) for (int r = 0; r < ROWS; r++) {
                    const __m256i q = _mm256_set1_epi32(query[ROWS * K + r]);
                    UNROLL(2) for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], codes[v], q);
                }
            },
            std::make_integer_sequence<int, COUNT>());
        query += ROWS * COUNT;
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) to[r][v] = sums[r][v];
}

template <int ROWS, int VECTORS>
INLINE void add_any_run(const Run& run, const __m256i* dwords, int lanes, const int32_t* query,
                        __m256i (&sums)[ROWS][VECTORS]) {
    with_planes(run.bits, [&](auto high, auto low) {
        constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
        if (run.form == FOUR_BYTES) return add_run<FOUR_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        if constexpr (HIGH <= 2) {
            if (run.form == TWO_BYTES) return add_run<TWO_BYTES, HIGH, LOW>(run, dwords, lanes, query, sums);
        }
        if constexpr (HIGH == 1) add_run<ONE_BYTE, HIGH, LOW>(run, dwords, lanes, query, sums);
    });
}

// Products of a part of queries with codes of 8 VECTORS tokens.
template <int ROWS, int VECTORS>
INLINE void products_of_keys(const Kernel& k, const Scratch& s, int64_t row, int part, int vector,
                             __m256 (&x)[ROWS][VECTORS]) {
    const auto* query = reinterpret_cast<const int32_t*>(s.parts) + (2 * row + part * ROWS) * k.key_dwords;
    const int lanes = 4 * int(k.key.layout.pieces.size());
    const auto* dwords = reinterpret_cast<const __m256i*>(s.codes) + vector * lanes;
    __m256i sums[ROWS][VECTORS];
    const auto for_all = [&](auto f) {
        UNROLL(10) for (int r = 0; r < ROWS; r++) UNROLL(2) for (int v = 0; v < VECTORS; v++) f(x[r][v], sums[r][v]);
    };
    for_all([](__m256& x, __m256i& sum) { x = __m256{}, sum = __m256i{}; });
    for (const Run& run : k.key.layout.runs) {
        if (run.follows_floats) {
            for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum), sum = __m256i{}; });
        }
        add_any_run<ROWS, VECTORS>(run, dwords, lanes, query, sums);
        query += ROWS * run.count * int(run.groups.size());
    }
    for_all([](__m256& x, __m256i& sum) { x += _mm256_cvtepi32_ps(sum); });
}

// Logits without the lowest bytes of queries.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int vector, Scratch& s) {
    const Kernel& k = s.kernel;
    __m256 x[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(k, s, row, 1, vector, x);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            x[r][v] = (x[r][v] * (s.unit[row + r] * 256) - s.middle[row + r]) * _mm256_load_ps(s.scale + t + 8 * v);
        }
    }
    for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            const __m256 half = _mm256_load_ps(s.halves + i * TILE + t + 8 * v);
            UNROLL(10) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
        }
    }
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) _mm256_store_ps(s.logits + (row + r) * TILE + t + 8 * v, x[r][v]);
    }
}

// What the lowest bytes add to them.
template <int ROWS, int VECTORS>
INLINE void score_low(int64_t row, int t, int vector, Scratch& s) {
    __m256 sums[ROWS][VECTORS];
    products_of_keys<ROWS, VECTORS>(s.kernel, s, row, 0, vector, sums);
    UNROLL(10) for (int r = 0; r < ROWS; r++) {
        UNROLL(2) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 8 * v;
            const __m256 more = sums[r][v] * s.unit[row + r] - s.lowest[row + r];
            _mm256_store_ps(x, _mm256_load_ps(x) + more * _mm256_load_ps(s.scale + t + 8 * v));
        }
    }
}

// One of both for 16 tokens.
template <int ROWS>
void score_sixteen(int64_t row, int t, bool low, Scratch& s) {
    constexpr int VECTORS = vectors_of_keys(ROWS);
    UNROLL(1) for (int v = 0; v < 2; v += VECTORS) {
        if (low) score_low<ROWS, VECTORS>(row, t + 8 * v, v, s);
        else score_high<ROWS, VECTORS>(row, t + 8 * v, v, s);
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    __m256i* dwords = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s), s);
        unpack_keys(k.key.layout, z, dwords, s.halves + t);
        for_blocks_of_rows<MOST_KEY_ROWS>(
            rows, [&](int first, auto count) { score_sixteen<decltype(count)::value>(row + first, t, false, s); });
    }
    if (a.digits == 2) return;
    set_limits(a, row, rows, s);
    for (int t = 0; t < whole; t += 16) {
        bool are_there = false;
        for_blocks_of_rows<MOST_KEY_ROWS>(rows, [&](int first, auto count) {
            constexpr int ROWS = decltype(count)::value;
            if (are_minor<ROWS>(row + first, t, 16, s)) return;
            const auto z = [&] {
                return looked_up(k.key, rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s), s);
            };
            if (!are_there) unpack_keys(k.key.layout, z(), dwords, s.halves + t);
            are_there = true;
            score_sixteen<ROWS>(row + first, t, true, s);
        });
    }
}

// Weights of a tile of values times the tokens' scales, as words and where they count as the bytes below.
INLINE void split_weights(int64_t row, int whole, int64_t digits, Scratch& s) {
    float* w = s.logits + row * TILE;
    __m256 top = {}, sum = {};
    for (int t = 0; t < whole; t += 8) {
        const __m256 scaled = _mm256_load_ps(w + t) * _mm256_load_ps(s.scale + t);
        _mm256_store_ps(w + t, scaled);
        sum += scaled;
        top = _mm256_max_ps(scaled, top);
    }
    const float largest = largest_of(top);
    State& state = s.states[row];
    Split& split = s.splits[row];
    state.mass += sum_of(sum);
    split.low = digits > 2 && !(largest * SMALL <= state.mass);
    const float limit = split.low ? 256 * LARGEST : LARGEST, inverse = largest > 1e-30f ? limit / largest : 0.0f;
    int16_t* parts = reinterpret_cast<int16_t*>(s.weights) + 2 * row * TILE;
    Ints8 total = {};
    for (int t = 0; t < whole; t += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(w + t) * inverse);
        const __m256i b = _mm256_cvtps_epi32(_mm256_load_ps(w + t + 8) * inverse);
        total += (Ints8)a + (Ints8)b;
        store_words(a, b, parts + TILE + t, split.low ? parts + t : nullptr);
    }
    split.unit = largest / limit;
    int32_t whole_total = 0;
    UNROLL(8) for (int i = 0; i < 8; i++) whole_total += total[i];
    split.total = float(whole_total);
}

// Of each 128 bits of x and y, two sums of two lanes of x and y each.
INLINE __m256i sums_of_dwords(__m256i x, __m256i y) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}

// Codes K and K + 1 of all words of a tile, `low` bits `at` in a word, times weights: to sums [rows, 2, R_V].
template <int HIGH, int LOW, int K, int ROWS>
INLINE void multiply_values(const __m256i* high, const __m256i* low, __m128i at, const int16_t* weights, int vectors,
                            int pad, int32_t* to) {
    __m256i sums[ROWS][2];
    UNROLL(5) for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = __m256i{};
    UNROLL(1) for (int t = 0; t < vectors; t++) {
        const __m256i x = load_words(high + t), y = LOW ? _mm256_srl_epi16(load_words(low + t), at) : x;
        const __m256i a = code_of<HIGH, LOW, K>(x, y), b = code_of<HIGH, LOW, K + 1>(x, y);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const __m256i w = load_words(weights + 2 * r * TILE + 16 * t);
            sums[r][0] = add_products(sums[r][0], a, w);
            sums[r][1] = add_products(sums[r][1], b, w);
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r += 2) {
        const int other = std::min(r + 1, ROWS - 1);
        const __m256i x = sums_of_dwords(sums[r][0], sums[r][1]), y = sums_of_dwords(sums[other][0], sums[other][1]);
        const __m256i z = _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * r * pad), four);
        if (other == r) continue;
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * other * pad), _mm_unpackhi_epi64(four, four));
    }
}

// The codes of a run of values from a channel on, times a part of weights.
template <int HIGH, int LOW, int ROWS>
void mix_run(const Run& run, const __m256i* words, const int16_t* weights, int vectors, int pad, int32_t* sums) {
    for (const Group& g : run.groups) {
        const __m128i at = _mm_cvtsi32_si128(g.low_at);
        const __m256i *high = words + g.high * vectors, *low = words + g.low * vectors;
        for_each(
            [&](auto k) {
                constexpr int K = 2 * decltype(k)::value;
                if (K >= run.count) return;
                multiply_values<HIGH, LOW, K, ROWS>(high, low, at, weights, vectors, pad, sums + K);
            },
            std::make_integer_sequence<int, 8 / HIGH>());
        sums += run.count;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const Kernel& k = s.kernel;
    const Layout& layout = k.value.layout;
    const int whole = whole_vectors(tokens), vectors = whole / 16;
    __m256i* words = reinterpret_cast<__m256i*>(s.codes);
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    for (int t = 0; t < vectors; t++) {
        const Sixteen z = looked_up(k.value, rows_of(a, k.value, a.value, p, j, begin, 16 * t, tokens, true, s), s);
        __m256i* to = words + t;
        for (const int piece : layout.pieces) {
            transpose_words(z, piece, vectors, to);
            to += 8 * vectors;
        }
    }
    for (int r = 0; r < rows; r++) split_weights(row + r, whole, a.digits, s);
    for_blocks_of_rows<MOST_VALUE_ROWS>(rows, [&](int first, auto block) {
        constexpr int ROWS = decltype(block)::value;
        const int16_t* weights = reinterpret_cast<const int16_t*>(s.weights) + 2 * (row + first) * TILE;
        int32_t* sums = s.products + 2 * (row + first) * k.value.pad;
        bool any = false;
        for (int r = 0; r < ROWS; r++) any |= s.splits[row + first + r].low;
        for (const Run& run : layout.runs) {
            with_planes(run.bits, [&](auto high, auto low) {
                constexpr int HIGH = decltype(high)::value, LOW = decltype(low)::value;
                const int pad = k.value.pad;
                mix_run<HIGH, LOW, ROWS>(run, words, weights + TILE, vectors, pad, sums + pad);
                if (any) mix_run<HIGH, LOW, ROWS>(run, words, weights, vectors, pad, sums);
            });
            sums += run.count * int(run.groups.size());
        }
    });
    for (int64_t r = row; r < row + rows; r++) {
        const Split& split = s.splits[r];
        const int32_t *low = s.products + 2 * r * k.value.pad, *high = low + k.value.pad;
        float* sum = s.states[r].sum;
        for (int c = 0; c < k.value.width; c += 8) {
            __m256 x = _mm256_cvtepi32_ps(load_words(high + c));
            if (split.low) x = x * 256.0f + _mm256_cvtepi32_ps(load_words(low + c));
            const __m256 middle = _mm256_loadu_ps(k.value.middle.data() + c);
            _mm256_store_ps(sum + c, _mm256_load_ps(sum + c) + (x - split.total * middle) * split.unit);
        }
    }
}

#endif
