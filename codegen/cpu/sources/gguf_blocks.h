//: Weights in the blocks of GGUF files, times a few rows of input. Part of block_linear.cpp, behind products.h.
// ------------------------------------------------------------------------------------------------ blocks
//
// A row of a weight is blocks of 32 or 256 numbers. 32 numbers of a block are a group:
//
//     w = scale * code + offset      a scale and an offset for each 16 numbers of it, or for all 32
//
// Codes are unsigned, or signed. The layouts are those of ggml (struct block_q4_0 and others of ggml-common.h).

typedef uint8_t Codes __attribute__((vector_size(32)));

INLINE float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return from_float16(half);
}

INLINE Codes codes_at(const uint8_t* p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof codes);
    return codes;
}

// Bytes shifted to the right, or with a negative count to the left, of which the bits of a mask are kept.
template <int COUNT, uint8_t MASK>
INLINE Codes bits_of(Codes x) {
    typedef uint16_t Words __attribute__((vector_size(32)));
    if constexpr (COUNT >= 0) return (Codes)((Words)x >> COUNT) & MASK;
    else return (Codes)((Words)x << -COUNT) & MASK;
}

// The lower halves of 16 bytes, then the upper ones.
INLINE Codes nibbles_at(const uint8_t* p) {
#if defined(__AVX2__)
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Codes)_mm256_set_m128i(_mm_srli_epi16(both, 4), both) & 15;
#else
    Bytes16 both[2];
    std::memcpy(both, p, 16);
    both[1] = both[0] >> 4, both[0] &= 15;
    Codes codes;
    std::memcpy(&codes, both, sizeof codes);
    return codes;
#endif
}

// Of IQ4: `kvalues_iq4nl` of ggml-common.h.
alignas(16) constexpr int8_t FOUR_BIT_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};

INLINE Codes four_bit_levels(Codes at) {
#if defined(__AVX2__)
    const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(FOUR_BIT_LEVELS));
    return (Codes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), (__m256i)at);
#else
    Codes levels;
    for (int i = 0; i < 32; i++) levels[i] = uint8_t(FOUR_BIT_LEVELS[at[i]]);
    return levels;
#endif
}

// What formats have in common, unless they say otherwise. PARTS: scales of a group. OFFSET: there are offsets. Of
// blocks of one group, `scales` gives those of one or of eight, and `codes<0>` the codes of one.
struct Plain {
    static constexpr int PARTS = 1;
    static constexpr bool SIGNED = false, OFFSET = true;
};

// Float16 numbers of COUNT blocks as floats, times a factor: one or eight.
template <Format FORMAT, int COUNT>
INLINE void small_scales(const uint8_t* b, float factor, float* to) {
    constexpr int64_t BYTES = size_of(FORMAT).bytes;
#if defined(__AVX2__)
    if constexpr (COUNT == 8) {  // eight stores that are read as one would be waited for
        Halves8 halves;
        UNROLL(8) for (int i = 0; i < 8; i++) std::memcpy(&halves[i], b + i * BYTES, 2);
        return store(to, (Floats8)_mm256_cvtph_ps((__m128i)halves) * factor);
    }
#endif
    for (int i = 0; i < COUNT; i++) to[i] = half_at(b + i * BYTES) * factor;
}

struct OfQ4_0 : Plain {
    static constexpr Format FORMAT = Q4_0;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        small_scales<Q4_0, COUNT>(b, 1.0f, scale), small_scales<Q4_0, COUNT>(b, -8.0f, offset);
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return nibbles_at(b + 2);
    }
};

struct OfQ4_1 : Plain {
    static constexpr Format FORMAT = Q4_1;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        small_scales<Q4_1, COUNT>(b, 1.0f, scale), small_scales<Q4_1, COUNT>(b + 2, 1.0f, offset);
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return nibbles_at(b + 4);
    }
};

struct OfQ8_0 : Plain {
    static constexpr Format FORMAT = Q8_0;
    static constexpr bool SIGNED = true, OFFSET = false;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float*) {
        small_scales<Q8_0, COUNT>(b, 1.0f, scale);
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return codes_at(b + 2);
    }
};

struct OfIQ4_NL : OfQ8_0 {
    static constexpr Format FORMAT = IQ4_NL;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float*) {
        small_scales<IQ4_NL, COUNT>(b, 1.0f, scale);
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return four_bit_levels(nibbles_at(b + 2));
    }
};

// Eight bytes as floats, times a factor.
INLINE void store_floats(uint64_t bytes, float factor, float* to) {
#if defined(__AVX2__)  // which GCC does not find by itself
    store(to, (Floats8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)))) * factor);
#else
    for (int i = 0; i < 8; i++) to[i] = float(bytes >> 8 * i & 255) * factor;
#endif
}

// Scales and offsets of 6 bits of eight groups, in 12 bytes.
INLINE void six_bit_scales(const uint8_t* b, float* scale, float* offset) {
    uint32_t low, middle, high;
    std::memcpy(&low, b + 4, 4), std::memcpy(&middle, b + 8, 4), std::memcpy(&high, b + 12, 4);
    const uint32_t upper_scales = (high & 0x0f0f0f0f) | (low >> 2 & 0x30303030);
    const uint32_t upper_offsets = (high >> 4 & 0x0f0f0f0f) | (middle >> 2 & 0x30303030);
    store_floats(uint64_t(upper_scales) << 32 | (low & 0x3f3f3f3f), half_at(b), scale);
    store_floats(uint64_t(upper_offsets) << 32 | (middle & 0x3f3f3f3f), -half_at(b + 2), offset);
}

struct OfQ4_K : Plain {
    static constexpr Format FORMAT = Q4_K;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        six_bit_scales(b, scale, offset);
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return bits_of<GROUP % 2 * 4, 15>(codes_at(b + 16 + GROUP / 2 * 32));
    }
};

struct OfQ5_K : OfQ4_K {
    static constexpr Format FORMAT = Q5_K;
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return bits_of<GROUP % 2 * 4, 15>(codes_at(b + 48 + GROUP / 2 * 32)) | bits_of<GROUP - 4, 16>(codes_at(b + 16));
    }
};

struct OfQ6_K : Plain {
    static constexpr Format FORMAT = Q6_K;
    static constexpr int PARTS = 2;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        const float factor = half_at(b + 208);
        for (int i = 0; i < 16; i += 8) {
            Floats8 its;
#if defined(__AVX2__)
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 192 + i));
            its = (Floats8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)) * factor;
#else
            for (int k = 0; k < 8; k++) its[k] = float(int8_t(b[192 + i + k])) * factor;
#endif
            store(scale + i, its), store(offset + i, its * -32.0f);
        }
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        constexpr int HALF = GROUP / 4, AT = GROUP % 4;
        const Codes both = codes_at(b + 64 * HALF + 32 * (AT % 2)), upper = codes_at(b + 128 + 32 * HALF);
        return bits_of<AT / 2 * 4, 15>(both) | bits_of<2 * AT - 4, 48>(upper);
    }
};

struct OfQ2_K : Plain {
    static constexpr Format FORMAT = Q2_K;
    static constexpr int PARTS = 2;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        for (int i = 0; i < 16; i += 8) {
            uint64_t eight;
            std::memcpy(&eight, b + i, 8);
            store_floats(eight & 0x0f0f0f0f0f0f0f0f, half_at(b + 80), scale + i);
            store_floats(eight >> 4 & 0x0f0f0f0f0f0f0f0f, -half_at(b + 82), offset + i);
        }
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return bits_of<GROUP % 4 * 2, 3>(codes_at(b + 16 + GROUP / 4 * 32));
    }
};

struct OfQ3_K : Plain {
    static constexpr Format FORMAT = Q3_K;
    static constexpr int PARTS = 2;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float* offset) {
        const float factor = half_at(b + 108);
        uint64_t low;
        uint32_t high;
        std::memcpy(&low, b + 96, 8), std::memcpy(&high, b + 104, 4);
        for (int i = 0; i < 2; i++) {  // two upper bits of four scales each
            const uint64_t first = high >> 4 * i & 0x03030303, second = high >> (4 * i + 2) & 0x03030303;
            store_floats((low >> 4 * i & 0x0f0f0f0f0f0f0f0f) | (first | second << 32) << 4, factor, scale + 8 * i);
        }
        for (int i = 0; i < 16; i++) scale[i] -= 32 * factor, offset[i] = -4 * scale[i];
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return bits_of<GROUP % 4 * 2, 3>(codes_at(b + 32 + GROUP / 4 * 32)) | bits_of<GROUP - 2, 4>(codes_at(b));
    }
};

struct OfIQ4_XS : Plain {
    static constexpr Format FORMAT = IQ4_XS;
    static constexpr bool SIGNED = true, OFFSET = false;
    template <int COUNT>
    static INLINE void scales(const uint8_t* b, float* scale, float*) {
        const float factor = half_at(b);
        const int upper = b[2] | b[3] << 8;
        for (int i = 0; i < 8; i++) {
            const int low = b[4 + i / 2] >> i % 2 * 4 & 15;
            scale[i] = factor * float((low | (upper >> 2 * i & 3) << 4) - 32);
        }
    }
    template <int GROUP>
    static INLINE Codes codes(const uint8_t* b) {
        return four_bit_levels(nibbles_at(b + 8 + 16 * GROUP));
    }
};

template <class F, int... I>
INLINE void for_groups(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// ------------------------------------------------------------------------------------------------ their products

constexpr int GROUP = 32;  // numbers

template <class T>
constexpr int NUMBERS = int(size_of(T::FORMAT).numbers);
template <class T>
constexpr int BYTES = int(size_of(T::FORMAT).bytes);

// Rows of the input as two bytes of each number, x = unit * (RADIX high + low), with a unit for each group: 15 bits of
// the largest number there, which is more than bfloat16 has. sum: of 16 numbers each, or of a group.
struct ByteRows {
    static constexpr int RADIX = 254;

    int64_t width;
    int8_t *high, *low;  // [rows, K]
    // Of a group, [rows, K / 32], and of its parts, [rows, K / 16].
    float *unit[2], *sum[2];
    float* numbers;  // [rows, K]

    ByteRows(int64_t rows, int64_t K) : width(K) {
        high = array<int8_t>(rows * K), low = array<int8_t>(rows * K);
        numbers = array<float>(rows * K);
        for (int i = 0; i < 2; i++) {
            unit[i] = array<float>(rows * K / 32 * (i + 1)), sum[i] = array<float>(rows * K / 32 * (i + 1));
        }
    }
    ByteRows(const ByteRows&) = delete;
    ~ByteRows() {
        for (void* p : {(void*)high, (void*)low, (void*)numbers}) std::free(p);
        for (int i = 0; i < 2; i++) std::free(unit[i]), std::free(sum[i]);
    }
    template <class T>
    static T* array(int64_t count) {
        return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64));
    }
    static INLINE void split_group([[maybe_unused]] const Floats8 (&x)[4], [[maybe_unused]] float inverse,
                                   [[maybe_unused]] int8_t* high, [[maybe_unused]] int8_t* low) {
#if defined(__AVX2__)
        __m256i upper[4], lower[4];
        for (int i = 0; i < 4; i++) {
            const Floats8 whole = x[i] * inverse;
            upper[i] = _mm256_cvtps_epi32((__m256)(whole * (1.0f / RADIX)));
            lower[i] = _mm256_cvtps_epi32((__m256)(whole - (Floats8)_mm256_cvtepi32_ps(upper[i]) * float(RADIX)));
        }
        const auto bytes = [](const __m256i* v, int8_t* to) {
            const __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), all);
        };
        bytes(upper, high), bytes(lower, low);
#endif
    }
    void split(int64_t row) {
        for (int64_t at = row * width; at < (row + 1) * width; at += GROUP) {
            const float* x = numbers + at;
            Floats8 eight[4], top = {};
            std::memcpy(eight, x, sizeof eight);
            for (const Floats8& v : eight) {
                const Floats8 magnitude = v < 0.0f ? -v : v;
                top = magnitude > top ? magnitude : top;
            }
            float largest = 0;
            for (int i = 0; i < 8; i++) largest = std::max(largest, top[i]);
            constexpr int MOST = 127 * RADIX + RADIX / 2 - 1;
            const float inverse = largest > 1e-30f ? MOST / largest : 0.0f;
            split_group(eight, inverse, high + at, low + at);
            for (int part = 0; part < 2; part++) {
                const Floats8 both = eight[2 * part] + eight[2 * part + 1];
                float added = 0;
                for (int i = 0; i < 8; i++) added += both[i];
                sum[1][at / 16 + part] = added;
            }
            const float total = sum[0][at / GROUP] = sum[1][at / 16] + sum[1][at / 16 + 1];
            const float its = largest / MOST + 0.0f * total;  // NaN where a number is, or is infinite
            unit[0][at / GROUP] = unit[1][at / 16] = unit[1][at / 16 + 1] = its;
        }
    }
};

#if defined(__AVX2__)
// Sums of four codes times numbers, each of two bytes.
template <bool SIGNED>
INLINE Floats8 sums_of_group(Codes codes, const int8_t* high, const int8_t* low) {
    const auto pairs = [&](const int8_t* row) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        if constexpr (!SIGNED) return _mm256_maddubs_epi16((__m256i)codes, x);
        else return _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)codes), _mm256_sign_epi8(x, (__m256i)codes));
    };
    const __m256i upper = _mm256_madd_epi16(pairs(high), _mm256_set1_epi16(ByteRows::RADIX));
    const __m256i lower = _mm256_madd_epi16(pairs(low), _mm256_set1_epi16(1));
    return (Floats8)_mm256_cvtepi32_ps(_mm256_add_epi32(upper, lower));
}

constexpr bool AS_BYTES = true;
#else
constexpr bool AS_BYTES = false;
#endif

// Keeps a compiler from taking numbers out of vectors that it has just stored: to read each again costs less.
template <class T>
INLINE void in_memory(T& numbers) {
    asm("" : "+m"(numbers));
}

constexpr int64_t FETCHED = 4096;  // bytes behind those that are multiplied

// What ROWS rows of the input, from `row` on, times a row of a weight add up to.
template <class T, int ROWS>
struct BlockSums {
    static constexpr bool SMALL = NUMBERS<T> == GROUP;  // a block is a group

    const ByteRows& x;
    int64_t row;
    Floats8 totals[2][ROWS] = {};  // of every second group

    // COUNT groups, the first of them at `blocks`, times numbers from `at` on.
    template <int COUNT>
    INLINE void add(const uint8_t* blocks, int64_t at) {
        constexpr int SCALES = COUNT * T::PARTS, ROOM = std::max(SCALES, 8);
        alignas(32) float scale[ROOM], offset[ROOM], factor[ROWS][ROOM];
        T::template scales<COUNT>(blocks, scale, offset);
        for (int64_t p = 0; p < COUNT * GROUP / NUMBERS<T> * BYTES<T>; p += 64) {
            __builtin_prefetch(blocks + FETCHED + p);
        }
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            const uint64_t part = uint64_t((row + r) * x.width + at) / (GROUP / T::PARTS);
            const float *unit = x.unit[T::PARTS - 1] + part, *sum = x.sum[T::PARTS - 1] + part;
            if constexpr (SCALES < 8) {
                for (int i = 0; i < SCALES; i++) {
                    factor[r][i] = AS_BYTES ? scale[i] * unit[i] : scale[i];
                    if (T::OFFSET) totals[1][r][i] += offset[i] * sum[i];
                }
            } else {
                for (int i = 0; i < SCALES; i += 8) {
                    store(factor[r] + i, AS_BYTES ? eight(scale + i) * eight(unit + i) : eight(scale + i));
                    if (T::OFFSET) totals[i / 8 % 2][r] += eight(offset + i) * eight(sum + i);
                }
            }
        }
        in_memory(factor);
        for_groups(std::make_integer_sequence<int, COUNT>(), [&](auto group) {
            constexpr int G = decltype(group)::value;
            const Codes codes = SMALL ? T::template codes<0>(blocks + G * BYTES<T>) : T::template codes<G>(blocks);
            UNROLL(4) for (int r = 0; r < ROWS; r++) {
                add_group<G>(codes, (row + r) * x.width + at + GROUP * G, factor[r] + T::PARTS * G, r);
            }
        });
    }
    template <int G>
    INLINE void add_group(Codes codes, int64_t at, const float* factor, int r) {
#if defined(__AVX2__)
        const Floats8 sum = sums_of_group<T::SIGNED>(codes, x.high + at, x.low + at);
        __m256 of_halves = _mm256_broadcast_ss(factor);
        if (T::PARTS == 2) of_halves = _mm256_blend_ps(of_halves, _mm256_broadcast_ss(factor + 1), 0xf0);
        totals[G % 2][r] += sum * (Floats8)of_halves;
#else
        for (int i = 0; i < 4; i++) {
            Floats8 code;
            for (int k = 0; k < 8; k++) code[k] = T::SIGNED ? float(int8_t(codes[8 * i + k])) : float(codes[8 * i + k]);
            totals[i % 2][r] += code * eight(x.numbers + at + 8 * i) * factor[i * T::PARTS / 4];
        }
#endif
    }
    static INLINE Floats8 eight(const float* p) {
        Floats8 v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    INLINE float of(int r) const {
        const Floats8 v = totals[0][r] + totals[1][r];
        return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
};

// Products of ROWS rows of the input, from `row` on, with a row of a weight.
template <class T, int ROWS>
void block_row(const ByteRows& x, int64_t row, const uint8_t* blocks, float* sums) {
    constexpr int STEP = 8 * GROUP, BYTES_OF_STEP = STEP / NUMBERS<T> * BYTES<T>;
    BlockSums<T, ROWS> its = {x, row};
    int64_t at = 0;
    for (; at + STEP <= x.width; at += STEP, blocks += BYTES_OF_STEP) its.template add<8>(blocks, at);
    if constexpr (its.SMALL) {
        for (; at < x.width; at += GROUP, blocks += BYTES<T>) its.template add<1>(blocks, at);
    }
    for (int r = 0; r < ROWS; r++) sums[r] = its.of(r);
}

template <class T, int... I>
void block_rows_at(std::integer_sequence<int, I...>, int count, const ByteRows& x, int64_t row, const uint8_t* blocks,
                   float* sums) {
    ((count == I + 1 ? block_row<T, I + 1>(x, row, blocks, sums) : void()), ...);
}

// The numbers of a block.
template <class T>
INLINE void unpack_block(const uint8_t* blocks, float* to) {
    float scale[16], offset[16] = {};
    T::template scales<NUMBERS<T> / GROUP>(blocks, scale, offset);
    for_groups(std::make_integer_sequence<int, NUMBERS<T> / GROUP>(), [&](auto group) {
        constexpr int G = decltype(group)::value, SIZE = GROUP / T::PARTS;
        const Codes codes = T::template codes<G>(blocks);
        uint8_t bytes[GROUP];
        std::memcpy(bytes, &codes, GROUP);
        for (int part = 0; part < T::PARTS; part++) {
            const float factor = scale[T::PARTS * G + part], added = T::OFFSET ? offset[T::PARTS * G + part] : 0.0f;
            float* numbers = to + GROUP * G + SIZE * part;
            const uint8_t* its = bytes + SIZE * part;
            for (int i = 0; i < SIZE; i++) {
                numbers[i] = (T::SIGNED ? float(int8_t(its[i])) : float(its[i])) * factor + added;
            }
        }
    });
}

// Calls f of the format.
template <class F>
void with_format(int64_t format, F f) {
    switch (format) {
        case Q4_0: return f(OfQ4_0());
        case Q4_1: return f(OfQ4_1());
        case Q8_0: return f(OfQ8_0());
        case Q2_K: return f(OfQ2_K());
        case Q3_K: return f(OfQ3_K());
        case Q4_K: return f(OfQ4_K());
        case Q5_K: return f(OfQ5_K());
        case Q6_K: return f(OfQ6_K());
        case IQ4_NL: return f(OfIQ4_NL());
        case IQ4_XS: return f(OfIQ4_XS());
    }
}
