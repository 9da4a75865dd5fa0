//: Scores and mixes of quantized values as bytes, with AVX-512 VNNI. Part of attention.cpp, behind quantized_rows.h.
// ------------------------------------------------------------------------------------------------ products of bytes

#if BYTES

// What takes a slice apart, in registers.
template <Kind KIND>
struct Taken {
    static constexpr bool MANY = is_many(KIND), LOW = depth_of(KIND) >= ONE_LOW, LOOKED = depth_of(KIND) == ONE_TRELLIS;
    const Slice::Block *block, *end;
    __m512i index, from[2], keep[2], levels, offsets, order;
    __mmask64 looked;
    int offset;

    INLINE explicit Taken(const Slice& slice) : block(slice.blocks.data()), end(block + slice.blocks.size()) {
        index = _mm512_load_si512(block->index);
        offset = block->offset;
        UNROLL(2) for (int i = 0; i < 1 + LOW; i++) {
            from[i] = _mm512_load_si512(slice.from[i]);
            keep[i] = _mm512_load_si512(slice.keep[i]);
        }
        looked = slice.looked;
        if (!LOOKED) return;
        const auto in_each_quarter = [](const void* p) {
            return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p)));
        };
        levels = in_each_quarter(LEVELS), offsets = in_each_quarter(OFFSETS), order = in_each_quarter(ORDER);
    }
    // The bytes of a row; what no code needs is arbitrary.
    INLINE __m512i bytes_of(const uint8_t* row) const {
        if (!MANY) return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(row + offset));
        __m512i out = {};
        for (const Slice::Block* b = block; b < end; b++) {
            const __m512i bytes = _mm512_loadu_si512(row + b->offset);
            out |= _mm512_maskz_permutexvar_epi8(b->mask, _mm512_load_si512(b->index), bytes);
        }
        return out;
    }
    INLINE __m512i codes_of(const uint8_t* row) const {
        if (KIND == WHOLE) return _mm512_loadu_si512(row + offset);
        const __m512i bytes = bytes_of(row);
        const __m512i high = _mm512_multishift_epi64_epi8(from[0], bytes) & keep[0];
        if (!LOW) return high;
        const __m512i codes = high | (_mm512_multishift_epi64_epi8(from[1], bytes) & keep[1]);
        return LOOKED ? _mm512_mask_mov_epi8(codes, looked, looked_up(high)) : codes;
    }
    // The codes of windows. Tables of 16 stand in every quarter, so that bits 4 and 5 of an index do not count.
    INLINE __m512i looked_up(__m512i window) const {
        const __m512i high = _mm512_srli_epi16(window, 4) ^ _mm512_permutexvar_epi8(window, order);
        return _mm512_add_epi8(_mm512_permutexvar_epi8(high, levels), _mm512_permutexvar_epi8(window, offsets));
    }
};

// Calls f(kind) with a compile-time kind of slices.
template <class F>
INLINE auto with_kind(Kind kind, F f) {
    switch (kind) {
        case WHOLE: return f(std::integral_constant<Kind, WHOLE>());
        case ONE_HIGH: return f(std::integral_constant<Kind, ONE_HIGH>());
        case ONE_LOW: return f(std::integral_constant<Kind, ONE_LOW>());
        case ONE_TRELLIS: return f(std::integral_constant<Kind, ONE_TRELLIS>());
        case MANY_HIGH: return f(std::integral_constant<Kind, MANY_HIGH>());
        case MANY_LOW: return f(std::integral_constant<Kind, MANY_LOW>());
        default: return f(std::integral_constant<Kind, MANY_TRELLIS>());
    }
}

// Calls f(taken), whose type says of what kind the slice is.
template <class F>
INLINE void with_slice(const Slice& slice, F f) {
    with_kind(slice.kind, [&](auto kind) { f(Taken<decltype(kind)::value>(slice)); });
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
INLINE void unpack_keys(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.key_vectors;
    for (const Slice& slice : k.key.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i x[16];
            UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.codes_of(rows[t]);
            transpose(x);
            UNROLL(16) for (int i = 0; i < 16; i++) if (i < left) _mm512_store_si512(codes + i, x[i]);
        });
        codes += 16;
        left -= 16;
    }
}

// Their float16 channels as floats [channels, TILE].
INLINE void unpack_halves(const Kernel& k, const Sixteen& rows, float* halves) {
    int left = k.halves / 2;
    for (const Slice& slice : k.key.layout.half_slices) {
        const Taken<MANY_HIGH> taken(slice);
        __m512i x[16];
        UNROLL(16) for (int t = 0; t < 16; t++) x[t] = taken.bytes_of(rows[t]);
        transpose(x);
        UNROLL(16) for (int i = 0; i < 16; i++) {
            if (i >= left) continue;
            float* out = halves + 2 * i * TILE;
            _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x[i])));
            _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16))));
        }
        halves += 32 * TILE;
        left -= 16;
    }
}

// 4 tokens of values, from `first` of 16 on -> codes of a slice, [4 vectors of 16 channels].
template <class T>
INLINE void unpack_slice(const T& taken, const Sixteen& rows, int first, __m512i* codes) {
    __m512i x[4];
    UNROLL(4) for (int t = 0; t < 4; t++) x[t] = taken.codes_of(rows[first + t]);
    interleave(x[0], x[1], x[2], x[3], codes);
}

// 16 tokens of values -> codes [4, vectors of 16 channels].
INLINE void unpack_values(const Kernel& k, const Sixteen& rows, __m512i* codes) {
    int left = k.value_vectors;
    for (const Slice& slice : k.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            UNROLL(4) for (int t = 0; t < 4; t++) {
                __m512i mixed[4];
                unpack_slice(taken, rows, 4 * t, mixed);
                UNROLL(4) for (int i = 0; i < 4; i++) {
                    if (i < left) _mm512_store_si512(codes + t * k.value_vectors + i, mixed[i]);
                }
            }
        });
        codes += 4;
        left -= 4;
    }
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

// sums[r][v][part] = sum_i codes[v][i] . factors[r][part][i], `step` and `next` vectors of codes from one i or v to the
// next, `width` factors from one part to the next.
template <int ROWS, int VECTORS, int PARTS>
INLINE void multiply(const __m512i* codes, int64_t step, int64_t next, const int32_t* factors, int64_t width, int count,
                     __m512i (&sums)[ROWS][VECTORS][PARTS]) {
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) UNROLL(3) for (int i = 0; i < PARTS; i++) sums[r][v][i] = __m512i{};
    }
    UNROLL(1) for (int i = 0; i < count; i++) {
        __m512i z[VECTORS];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) z[v] = _mm512_load_si512(codes + i * step + v * next);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(3) for (int part = 0; part < PARTS; part++) {
                const int32_t& factor = factors[(3 * r + part) * width + i];
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
constexpr float largest_integer(int parts) { return parts == 3 ? 8355000.0f : parts == 2 ? 32500.0f : 127.0f; }

// 16 integers as PARTS times 16 signed bytes: digits of base 256.
template <int PARTS>
INLINE void store_parts(Ints16 x, int8_t* out, int64_t stride) {
    constexpr int half = PARTS == 3 ? 0x808080 : PARTS == 2 ? 0x8080 : 0x80;
    const __m512i digits = (__m512i)((x + half) ^ half);
    UNROLL(3) for (int i = 0; i < PARTS; i++) {
        _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8 * i)));
    }
}

// 16 numbers of a query of floats, for the codes of keys from `first` on; 0 behind the last.
INLINE Floats16 query_of_codes(const Kernel& k, const float* query, int first) {
    const int lanes = std::min(k.key.layout.count() - first, 16);
    const Code* codes = k.key.layout.codes.data() + first;
    if (lanes <= 0) return Floats16{};
    if (k.in_order) {
        const __mmask16 mask = __mmask16((1 << lanes) - 1);
        return (Floats16)_mm512_maskz_loadu_ps(mask, query + codes->channel) * load(k.key_factor.data() + first);
    }
    alignas(64) float q[16] = {};
    for (int lane = 0; lane < lanes; lane++) q[lane] = query[codes[lane].channel] * k.key_factor[first + lane];
    return load(q);
}

// A query of floats in the order of channels -> its parts, [3, key_dwords, 4], and what one stands for. What the middle
// of all codes adds to a logit: by all digits but the lowest, and by the lowest. Channels from `fine` on have one part,
// where others have their lowest digit, in units of `coarse`; what their middle adds is among the former.
void to_parts(const Kernel& k, const float* query, int fine, int8_t* parts, float& unit, float& middle, float& lowest,
              float& coarse) {
    const int padded = 4 * k.key_dwords;
    Floats most = {}, least = {}, nothing = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i), size = q < 0.0f ? -q : q;
        if (i < fine) most = size > most ? size : most;
        else least = size > least ? size : least;
        nothing += q * 0.0f;  // NaN stays NaN
    }
    const float largest = largest_of(most), none = sum_of(nothing);
    const float inverse = largest > 1e-30f ? largest_integer(3) / largest : 0.0f;
    coarse = largest_of(least) / largest_integer(1);
    const float inverse_of_coarse = coarse > 1e-30f ? 1 / coarse : 0.0f;
    Floats sum = {}, low = {}, one = {};
    for (int i = 0; i < padded; i += 16) {
        const Floats q = query_of_codes(k, query, i);
        if (i >= fine) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse_of_coarse));
            store_parts<1>(x, parts + i, padded);
            one += __builtin_convertvector(x, Floats16) * load(k.key_middle.data() + i);
            continue;
        }
        const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(q * inverse));
        store_parts<3>(x, parts + i, padded);
        const Ints16 digit = (x << 24) >> 24;
        sum += __builtin_convertvector(x - digit, Floats16) * load(k.key_middle.data() + i);
        low += __builtin_convertvector(digit, Floats16) * load(k.key_middle.data() + i);
    }
    unit = largest / largest_integer(3) + none;
    middle = sum_of(sum) * unit + sum_of(one) * coarse;
    lowest = sum_of(low) * unit;
}

// Logits without the lowest of the three digits of queries; of codes from dword `fine` on with the one they have.
template <int ROWS, int VECTORS>
INLINE void score_high(int64_t row, int t, int fine, Scratch& s) {
    __m512i sums[ROWS][VECTORS][2];
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + (row * 3 + 1) * k.key_dwords;
    multiply<ROWS, VECTORS, 2>(codes, 1, k.key_vectors, query, k.key_dwords, fine, sums);
    Floats16 x[ROWS][VECTORS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float unit = s.unit[row + r] * 256.0f;
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] = joined(sums[r][v]) * unit - s.middle[row + r];
    }
    if (fine < k.key_vectors) {
        __m512i rest[ROWS][VECTORS][1];
        const int32_t* parts = query - k.key_dwords + fine;
        multiply<ROWS, VECTORS, 1>(codes + fine, 1, k.key_vectors, parts, k.key_dwords, k.key_vectors - fine, rest);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] += joined(rest[r][v]) * s.coarse[row + r];
        }
    }
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) x[r][v] *= load(s.scale + t + 16 * v);
    }
    UNROLL(1) for (int i = 0; i < k.halves; i++) {
        const float* q = s.query + row * k.key.pad + k.key.layout.half_channel[i];
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            const Floats16 half = load(s.halves + i * TILE + t + 16 * v);
            UNROLL(5) for (int r = 0; r < ROWS; r++) x[r][v] += q[r * k.key.pad] * half;
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
    const Kernel& k = s.kernel;
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + t / 16 * k.key_vectors;
    const int32_t* query = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * k.key_dwords;
    multiply<ROWS, VECTORS, 1>(codes, 1, k.key_vectors, query, k.key_dwords, k.key_vectors, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        UNROLL(4) for (int v = 0; v < VECTORS; v++) {
            float* x = s.logits + (row + r) * TILE + t + 16 * v;
            const Floats16 more = joined(sums[r][v]) * s.unit[row + r] - s.lowest[row + r];
            store(x, load(x) + more * load(s.scale + t + 16 * v));
        }
    }
}

template <int ROWS, int VECTORS, class F>
INLINE void for_vectors(int whole, F f) {
    int t = 0;
    for (; t + 16 * VECTORS <= whole; t += 16 * VECTORS) f(t, std::integral_constant<int, VECTORS>());
    for (; t < whole; t += 16) f(t, std::integral_constant<int, 1>());
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
template <Kind KIND, int PARTS>
INLINE Floats16 products_of_row(const Kernel& k, const Sixteen& rows, const int8_t* parts) {
    Floats16 fours[4];
    UNROLL(2) for (int i = 0; i < 4; i += 2) {
        __m512i sums[8][PARTS] = {};
        const int8_t* part = parts;
        for (const Slice& slice : k.key.layout.slices) {
            const Taken<KIND> taken(slice);
            __m512i query[PARTS];
            UNROLL(2) for (int n = 0; n < PARTS; n++) query[n] = _mm512_loadu_si512(part + n * 4 * k.key_dwords);
            UNROLL(8) for (int t = 0; t < 8; t++) {
                const __m512i codes = taken.codes_of(rows[4 * i + t]);
                UNROLL(2) for (int n = 0; n < PARTS; n++) sums[t][n] = add_products(sums[t][n], codes, query[n]);
            }
            part += 64;
        }
        UNROLL(2) for (int n = 0; n < 2; n++) {
            Floats16 x[4];
            UNROLL(4) for (int t = 0; t < 4; t++) x[t] = joined(sums[4 * n + t]);
            fours[i + n] = sums_of_4(x);
        }
    }
    return sums_of_quarters(sums_of_quarters(fours[0], fours[1]), sums_of_quarters(fours[2], fours[3]));
}

// Logits of a tile of keys for one row; KIND serves all slices.
template <Kind KIND>
void score_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, Scratch& s) {
    const Kernel& k = s.kernel;
    const int whole = whole_vectors(tokens);
    const int8_t* parts = s.parts + row * 12 * k.key_dwords;
    float* logits = s.logits + row * TILE;
    const float unit = s.unit[row];
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        const Floats16 high = products_of_row<KIND, 2>(k, z, parts + 4 * k.key_dwords);
        Floats16 x = (high * (unit * 256.0f) - s.middle[row]) * load(s.scale + t);
        unpack_halves(k, z, s.halves + t);
        for (int i = 0; i < k.halves; i++) {
            x += s.query[row * k.key.pad + k.key.layout.half_channel[i]] * load(s.halves + i * TILE + t);
        }
        store(logits + t, x);
    }
    if (a.digits == 2) return;
    set_limits(a, row, 1, s);
    for (int t = 0; t < whole; t += 16) {
        if (are_minor<1>(row, t, 16, s)) continue;
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, false, s);
        const Floats16 more = products_of_row<KIND, 1>(k, z, parts) * unit - s.lowest[row];
        store(logits + t, load(logits + t) + more * load(s.scale + t));
    }
}

// Few rows share codes: these are multiplied while they are in registers. Sums of at most so many rows leave room for
// the codes of 16 tokens.
constexpr int FEW_ROWS = 3;

INLINE bool are_few(const Arguments& a, int rows) { return a.digits == 2 && rows > 1 && rows <= FEW_ROWS; }

// Digits of the queries of few rows from `row` on, as `score_slice` reads them: int32 [key_dwords, 3, rows].
INLINE int32_t* digits_of_few(int64_t row, const Scratch& s) {
    return reinterpret_cast<int32_t*>(s.parts) + (s.rows + row) * 3 * s.kernel.key_dwords;
}

void arrange_queries(const Arguments& a, int64_t row, int rows, Scratch& s) {
    if (!are_few(a, rows)) return;
    const int width = s.kernel.key_dwords;
    const int32_t* parts = reinterpret_cast<const int32_t*>(s.parts) + row * 3 * width;
    int32_t* out = digits_of_few(row, s);
    for (int part = 0; part < 3; part++) {
        for (int r = 0; r < rows; r++) {
            const int32_t* from = parts + (3 * r + part) * width;
            for (int i = 0; i < width; i++) out[(3 * i + part) * rows + r] = from[i];
        }
    }
}

// Logits of a tile of keys for few rows from a slice on that begins with dword `first`; in the scratch are sums of the
// slices before, of each digit. Codes from dword `fine` on are multiplied by the lowest digits, others by the two more.
template <int ROWS, Kind KIND>
INLINE void score_slice(const Taken<KIND>& taken, const Arguments& a, const Part& p, int64_t j, int64_t begin,
                        int tokens, int64_t row, int first, int fine, Scratch& s) {
    const Kernel& k = s.kernel;
    const int count = k.key_vectors - first, of_two = fine - first;
    const bool is_last = count <= 16;
    const int32_t* digits = digits_of_few(row, s) + first * 3 * ROWS;
    auto* kept = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < tokens; t += 16, kept += 3 * ROWS) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, first == 0, s);
        __m512i x[16], sums[3][ROWS];
        UNROLL(16) for (int i = 0; i < 16; i++) x[i] = taken.codes_of(z[i]);
        transpose(x);
        UNROLL(3) for (int part = 0; part < 3; part++) {
            UNROLL(3) for (int r = 0; r < ROWS; r++) {
                sums[part][r] = first ? _mm512_load_si512(kept + part * ROWS + r) : __m512i{};
            }
        }
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            if (i >= count) break;
            if (i < of_two) {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[1][r] = add_products(sums[1][r], x[n], digits[(3 * n + 1) * ROWS + r]);
                        sums[2][r] = add_products(sums[2][r], x[n], digits[(3 * n + 2) * ROWS + r]);
                    }
                }
            } else {
                UNROLL(4) for (int n = i; n < i + 4; n++) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[0][r] = add_products(sums[0][r], x[n], digits[3 * n * ROWS + r]);
                    }
                }
            }
        }
        if (!is_last) {
            UNROLL(3) for (int part = 0; part < 3; part++) {
                UNROLL(3) for (int r = 0; r < ROWS; r++) _mm512_store_si512(kept + part * ROWS + r, sums[part][r]);
            }
            continue;
        }
        if (k.halves) unpack_halves(k, z, s.halves + t);
        UNROLL(3) for (int r = 0; r < ROWS; r++) {
            const __m512i high[2] = {sums[1][r], sums[2][r]};
            Floats16 logits = joined(high) * (s.unit[row + r] * 256.0f) - s.middle[row + r];
            logits += __builtin_convertvector((Ints16)sums[0][r], Floats16) * s.coarse[row + r];
            logits *= load(s.scale + t);
            for (int i = 0; i < k.halves; i++) {
                const float q = s.query[(row + r) * k.key.pad + k.key.layout.half_channel[i]];
                logits += q * load(s.halves + i * TILE + t);
            }
            store(s.logits + (row + r) * TILE + t, logits);
        }
    }
}

template <int ROWS>
void score_few(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
               Scratch& s) {
    int first = 0;
    for (const Slice& slice : s.kernel.key.layout.slices) {
        with_slice(slice,
                   [&](const auto& taken) { score_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, s); });
        first += 16;
    }
}

// Logits of a tile of keys for `rows` rows from `row` on, all of them of latent head j.
void score_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
                 Scratch& s) {
    const Kernel& k = s.kernel;
    load_scales(k.key, a.key_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        return with_kind(k.key.layout.kind,
                         [&](auto kind) { score_row<decltype(kind)::value>(a, p, j, begin, tokens, row, s); });
    }
    const int whole = whole_vectors(tokens), fine = std::min(fine_keys(a, rows, k) / 4, k.key_vectors);  // dwords
    if (are_few(a, rows)) {
        if (rows == 2) score_few<2>(a, p, j, begin, tokens, row, fine, s);
        else score_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.key, a.key, p, j, begin, t, tokens, true, s);
        unpack_keys(k, z, codes + t / 16 * k.key_vectors);
        unpack_halves(k, z, s.halves + t);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        // clang-format off
        for_vectors<ROWS, vectors_for(ROWS, 2)>(whole, [&](int t, auto vectors) {
            score_high<ROWS, decltype(vectors)::value>(row + first, t, fine, s);
        });
        if (a.digits == 2) return;
        set_limits(a, row + first, ROWS, s);
        for_vectors<ROWS, vectors_for(ROWS, 1)>(whole, [&](int t, auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            if (!are_minor<ROWS>(row + first, t, 16 * VECTORS, s)) score_low<ROWS, VECTORS>(row + first, t, s);
        });
        // clang-format on
    });
}

constexpr Ints16 LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What the integers of a row's weights stand for, and their sum; that of the same weights in one byte.
struct Weights {
    float unit, total, bytes;
};

// What becomes of a tile's weights: two or three digits, one byte each beside two digits, or that byte alone.
enum Digits { ALL_DIGITS, TWO_AND_BYTES, BYTES_ALONE };

// Weights of a tile of values times the tokens' scales, split into as many parts as is returned; weights in one byte
// stand in the third. What that rounds away goes to the token that stands 16 behind, so that many small weights are not
// lost together: where their tokens share a mean, it would be missing.
template <int ROWS>
int scale_and_split(Digits wanted, int64_t row, int whole, int64_t digits, Weights* weights, Scratch& s) {
    Floats tops[ROWS] = {}, masses[ROWS] = {};
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        const Floats scale = load(s.scale + t);
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            float* w = s.logits + (row + r) * TILE + t;
            const Floats scaled = load(w) * scale;
            store(w, scaled);
            masses[r] += scaled;
            tops[r] = scaled > tops[r] ? scaled : tops[r];
        }
    }
    bool small = true;  // in all rows
    float inverse[ROWS];
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        State& state = s.states[row + r];
        state.mass += sum_of(masses[r]);
        weights[r].unit = largest_of(tops[r]);
        small &= weights[r].unit * SMALL <= state.mass;
    }
    small |= wanted != ALL_DIGITS || digits == 2;
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const float limit = largest_integer(small ? 2 : 3);
        inverse[r] = weights[r].unit > 1e-30f ? limit / weights[r].unit : 0.0f;
        weights[r].unit /= limit;
    }
    Ints16 sums[ROWS] = {}, bytes[ROWS] = {}, rest[ROWS];
    for (Ints16& x : rest) x = (LANE_NUMBERS - 7) * 16 + 120;  // not all lanes round up at once
    UNROLL(1) for (int t = 0; t < whole; t += 16) {
        UNROLL(5) for (int r = 0; r < ROWS; r++) {
            const Ints16 x = (Ints16)_mm512_cvtps_epi32((__m512)(load(s.logits + (row + r) * TILE + t) * inverse[r]));
            int8_t* parts = s.weights + 3 * r * TILE + t;
            if (wanted != BYTES_ALONE) {
                sums[r] += x;
                if (small) store_parts<2>(x, parts, TILE);
                else store_parts<3>(x, parts, TILE);
            }
            if (wanted == ALL_DIGITS) continue;
            rest[r] = (rest[r] & 255) + x;
            const Ints16 byte = rest[r] >> 8;
            bytes[r] += byte;
            _mm_store_si128(reinterpret_cast<__m128i*>(parts + 2 * TILE), _mm512_cvtepi32_epi8((__m512i)byte));
        }
    }
    const auto all = [](Ints16 y) { return float(_mm512_reduce_add_epi32((__m512i)y)); };
    UNROLL(5) for (int r = 0; r < ROWS; r++) weights[r].total = all(sums[r]), weights[r].bytes = all(bytes[r]);
    return small ? 2 : 3;
}

// Sums of products from vector `vector` on, without the middle of the codes, are added to a state.
template <int VECTORS, int PARTS>
INLINE void add_sums(const __m512i (&sums)[VECTORS][PARTS], const Side& side, int vector, int count, float unit,
                     float total, State& to) {
    UNROLL(4) for (int v = 0; v < VECTORS; v++) {
        if (v >= count) continue;
        float* sum = to.sum + 16 * (vector + v);
        const Floats16 x = joined(sums[v]) - total * load(side.middle.data() + 16 * (vector + v));
        store(sum, load(sum) + unit * x);
    }
}

// Of PARTS 1 the weights in one byte.
template <int ROWS, int VECTORS, int PARTS>
INLINE void mix_bytes(int vector, int count, const Weights* weights, State* states, Scratch& s) {
    __m512i sums[ROWS][VECTORS][PARTS];
    const __m512i* codes = reinterpret_cast<const __m512i*>(s.codes) + vector;
    const auto* parts = reinterpret_cast<const int32_t*>(s.weights + (PARTS == 1 ? 2 * TILE : 0));
    multiply<ROWS, VECTORS, PARTS>(codes, s.kernel.value_vectors, 1, parts, TILE / 4, count, sums);
    UNROLL(5) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        const float unit = PARTS == 1 ? 256 * w.unit : w.unit, total = PARTS == 1 ? w.bytes : w.total;
        add_sums(sums[r], s.kernel.value, vector, VECTORS, unit, total, states[r]);
    }
}

// Vectors of channels from `begin` to `end`.
template <int ROWS, int PARTS>
void mix_block(int begin, int end, int count, const Weights* weights, State* states, Scratch& s) {
    constexpr int VECTORS = vectors_for(ROWS, PARTS);
    const int rest = (end - begin) % VECTORS;
    for (int v = begin; v < end - rest; v += VECTORS) mix_bytes<ROWS, VECTORS, PARTS>(v, count, weights, states, s);
    const auto mix_rest = [&](int v, auto vectors) {
        mix_bytes<ROWS, decltype(vectors)::value, PARTS>(v, count, weights, states, s);
    };
    for_count(rest, end - rest, mix_rest, std::make_integer_sequence<int, VECTORS - 1>());
}

// One row: codes are multiplied as soon as they are there.
template <int PARTS>
void mix_row(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, float unit, float total,
             State& state, Scratch& s) {
    const Side& side = s.kernel.value;
    int vector = 0;
    for (const Slice& slice : side.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            __m512i sums[4][PARTS] = {};
            for (int t = 0; t < tokens; t += 16) {
                const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, vector == 0, s);
                UNROLL(4) for (int i = 0; i < 16; i += 4) {
                    __m512i codes[4];
                    unpack_slice(taken, z, i, codes);
                    UNROLL(3) for (int part = 0; part < PARTS; part++) {
                        const int32_t& weight = *reinterpret_cast<const int32_t*>(s.weights + part * TILE + t + i);
                        UNROLL(4) for (int v = 0; v < 4; v++) {
                            sums[v][part] = add_products(sums[v][part], codes[v], weight);
                        }
                    }
                }
            }
            add_sums(sums, side, vector, s.kernel.value_vectors - vector, unit, total, state);
        });
        vector += 4;
    }
}

// The weights of a tile for vectors of 16 channels, of which those from `fine` on are multiplied by one byte.
template <int ROWS>
INLINE int split_for(const Arguments& a, int fine, int64_t row, int whole, Weights* weights, Scratch& s) {
    const bool all = fine == s.kernel.value_vectors;
    const Digits wanted = all ? ALL_DIGITS : fine == 0 ? BYTES_ALONE : TWO_AND_BYTES;
    return scale_and_split<ROWS>(wanted, row, whole, a.digits, weights, s);
}

// Few rows: codes of a slice that begins with vector `first` are multiplied as soon as they are there.
template <int ROWS, Kind KIND>
INLINE void mix_slice(const Taken<KIND>& taken, const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens,
                      int64_t row, int first, int fine, const Weights* weights, Scratch& s) {
    const Side& side = s.kernel.value;
    const int count = s.kernel.value_vectors - first, of_two = fine - first;
    const auto* digits = reinterpret_cast<const int32_t*>(s.weights);
    __m512i sums[ROWS][4][2] = {};
    for (int t = 0; t < tokens; t += 16) {
        const Sixteen z = rows_of(a, side, a.value, p, j, begin, t, tokens, first == 0, s);
        UNROLL(4) for (int i = 0; i < 16; i += 4) {
            __m512i codes[4];
            unpack_slice(taken, z, i, codes);
            const int32_t* digit = digits + (t + i) / 4;
            UNROLL(4) for (int v = 0; v < 4; v++) {
                if (v >= count) break;
                if (v < of_two) {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        UNROLL(2) for (int part = 0; part < 2; part++) {
                            const int32_t& factor = digit[(3 * r + part) * (TILE / 4)];
                            sums[r][v][part] = add_products(sums[r][v][part], codes[v], factor);
                        }
                    }
                } else {
                    UNROLL(3) for (int r = 0; r < ROWS; r++) {
                        sums[r][v][0] = add_products(sums[r][v][0], codes[v], digit[(3 * r + 2) * (TILE / 4)]);
                    }
                }
            }
        }
    }
    UNROLL(3) for (int r = 0; r < ROWS; r++) {
        const Weights& w = weights[r];
        State& state = s.states[row + r];
        UNROLL(4) for (int v = 0; v < 4; v++) {
            if (v >= count) break;
            const __m512i two[1][2] = {{sums[r][v][0], sums[r][v][1]}}, one[1][1] = {{sums[r][v][0]}};
            if (v < of_two) add_sums(two, side, first + v, 1, w.unit, w.total, state);
            else add_sums(one, side, first + v, 1, 256 * w.unit, w.bytes, state);
        }
    }
}

template <int ROWS>
void mix_few(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int fine,
             Scratch& s) {
    Weights weights[ROWS];
    split_for<ROWS>(a, fine, row, whole_vectors(tokens), weights, s);
    int first = 0;
    for (const Slice& slice : s.kernel.value.layout.slices) {
        with_slice(slice, [&](const auto& taken) {
            mix_slice<ROWS>(taken, a, p, j, begin, tokens, row, first, fine, weights, s);
        });
        first += 4;
    }
}

// Adds a tile of values to the states of `rows` rows from `row` on, all of them of latent head j.
void mix_codes(const Arguments& a, const Part& p, int64_t j, int64_t begin, int tokens, int64_t row, int rows,
               Scratch& s) {
    const int whole = whole_vectors(tokens);
    const Kernel& k = s.kernel;
    load_scales(k.value, a.value_scale, p, j, begin, tokens, s);
    if (rows == 1) {
        Weights w;
        const int parts = scale_and_split<1>(ALL_DIGITS, row, whole, a.digits, &w, s);
        if (parts == 2) mix_row<2>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        else mix_row<3>(a, p, j, begin, tokens, w.unit, w.total, s.states[row], s);
        return;
    }
    const int fine = std::min(fine_values(a, k) / 16, k.value_vectors);
    if (are_few(a, rows)) {
        if (rows == 2) mix_few<2>(a, p, j, begin, tokens, row, fine, s);
        else mix_few<3>(a, p, j, begin, tokens, row, fine, s);
        return;
    }
    __m512i* codes = reinterpret_cast<__m512i*>(s.codes);
    for (int t = 0; t < whole; t += 16) {
        const Sixteen z = rows_of(a, k.value, a.value, p, j, begin, t, tokens, true, s);
        unpack_values(k, z, codes + t / 4 * k.value_vectors);
    }
    for_blocks_of_rows<MOST_BYTE_ROWS>(rows, [&](int first, auto count) {
        constexpr int ROWS = decltype(count)::value;
        Weights weights[ROWS];
        State* states = s.states + row + first;
        const int parts = split_for<ROWS>(a, fine, row + first, whole, weights, s);
        if (parts == 2) mix_block<ROWS, 2>(0, fine, whole / 4, weights, states, s);
        else mix_block<ROWS, 3>(0, fine, whole / 4, weights, states, s);
        mix_block<ROWS, 1>(fine, k.value_vectors, whole / 4, weights, states, s);
    });
}

#endif
