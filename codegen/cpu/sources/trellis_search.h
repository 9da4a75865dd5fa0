//: Rings of trellis codes from numbers. Part of packing.cpp, behind trellis.h.
// ------------------------------------------------------------------------------------------------ search of a trellis
//
// The Viterbi algorithm: a state is the WINDOW - BITS newest bits, of which each window, 2^BITS of them, leads to one.
// The cost of a window is its error's square. Sums are made in the order of fhopt/ops/trellis.py, and of equal costs
// the first counts.

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints16{__VA_ARGS__})
#endif

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));

constexpr int WINDOWS = 1 << WINDOW;
constexpr int AROUND = 12;         // channels on either side of the seam that the first search sees
constexpr float FARTHEST = 1024;   // numbers are searched for up to so many steps
constexpr float UNREACHED = 1e30f;  // cost of a state in which no ring may begin

// Of each window: its value in steps.
struct Windows {
    alignas(64) float value[WINDOWS];

    Windows() {
        for (int w = 0; w < WINDOWS; w++) value[w] = float(TRELLIS[w]) - 127.5f;
    }
};

const Windows windows;

// The lesser of each two neighbours of 32 numbers.
INLINE Floats16 least_of_pairs(Floats16 a, Floats16 b) {
    const Floats16 even = PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Floats16 odd = PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return odd < even ? odd : even;
}

template <int BITS>
struct Trellis {
    static constexpr int BRANCHES = 1 << BITS, STATES = WINDOWS >> BITS, VECTORS = STATES / 16;

    // Costs of states behind one more channel, from those before it.
    static void step(const float* before, float x, float* after) {
        Floats16 costs[WINDOWS / 16];
        for (int v = 0; v < WINDOWS / 16; v++) {
            const Floats16 error = x - load<Floats16>(windows.value + 16 * v);
            costs[v] = load<Floats16>(before + v % VECTORS * 16) + error * error;
        }
        for (int count = WINDOWS / 32; count >= VECTORS; count /= 2) {
            for (int v = 0; v < count; v++) costs[v] = least_of_pairs(costs[2 * v], costs[2 * v + 1]);
        }
        for (int v = 0; v < VECTORS; v++) store(after + 16 * v, costs[v]);
    }

    // The window of the channel between costs `before` and a state.
    static int window(const float* before, float x, int state) {
        int found = state * BRANCHES;
        float least = UNREACHED * 2;
        for (int w = state * BRANCHES; w < (state + 1) * BRANCHES; w++) {
            const float error = x - windows.value[w], cost = before[w & (STATES - 1)] + error * error;
            if (cost < least) least = cost, found = w;
        }
        return found;
    }

    // The windows of least error for x [width] from channel `first` on, from any state to any, or from the state
    // `closed` to itself. costs [width + 1, STATES].
    static void search(const float* x, int64_t width, int closed, float* costs, uint8_t* found, int64_t first = 0) {
        std::fill_n(costs, STATES, closed < 0 ? 0.0f : UNREACHED);
        if (closed >= 0) costs[closed] = 0;
        for (int64_t c = 0; c < width; c++) step(costs + c * STATES, x[c], costs + (c + 1) * STATES);
        const float* last = costs + width * STATES;
        int state = closed < 0 ? int(std::min_element(last, last + STATES) - last) : closed;
        for (int64_t c = width - 1; c >= first; c--) {
            found[c] = uint8_t(window(costs + c * STATES, x[c], state));
            state = found[c] & (STATES - 1);
        }
    }

    // x [width], a multiple of 8 -> a ring
    static void encode(const float* x, int64_t width, uint8_t* ring) {
        const int64_t around = std::min<int64_t>(AROUND, width / 2);
        thread_local std::vector<float> costs;
        thread_local std::vector<uint8_t> found;
        if (costs.size() < size_t(width + 1) * STATES) costs.resize((width + 1) * STATES);
        if (found.size() < size_t(width)) found.resize(width);
        float seam[2 * AROUND];
        std::copy_n(x + width - around, around, seam);
        std::copy_n(x, around, seam + around);
        search(seam, 2 * around, -1, costs.data(), found.data(), around - 1);
        search(x, width, found[around - 1] >> BITS, costs.data(), found.data());
        for (int64_t i = 0; i < width; i += 8) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= uint64_t(found[i + j] >> (WINDOW - BITS)) << j * BITS;
            std::memcpy(ring + i / 8 * BITS, &word, BITS);
        }
    }
};

void write_ring(const float* x, int64_t width, int bits, uint8_t* ring) {
    switch (bits) {
        case 1: return Trellis<1>::encode(x, width, ring);
        case 2: return Trellis<2>::encode(x, width, ring);
        case 3: return Trellis<3>::encode(x, width, ring);
        default: return Trellis<4>::encode(x, width, ring);
    }
}
