//: The formats of blocks in GGUF files whose products have a kernel. Needs <cstdint>.
// ------------------------------------------------------------------------------------------------ formats of blocks

enum Format : int64_t {  // as ggml numbers them
    Q4_0 = 2,
    Q4_1 = 3,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23
};

constexpr int64_t FORMATS = 16;  // the type of a call: FORMATS times the format, plus the type of everything else

struct Size {
    int64_t numbers, bytes;  // of a block
};

constexpr Size size_of(int64_t format) {
    switch (format) {
        case Q4_0: return {32, 18};
        case Q4_1: return {32, 20};
        case Q8_0: return {32, 34};
        case Q2_K: return {256, 84};
        case Q3_K: return {256, 110};
        case Q4_K: return {256, 144};
        case Q5_K: return {256, 176};
        case Q6_K: return {256, 210};
        case IQ4_NL: return {32, 18};
        case IQ4_XS: return {256, 136};
        default: return {0, 0};
    }
}
