//: Keys that are relative to segments. Needs <algorithm> and <cstdint>.
// How queries turn to read the keys of a segment, and these to be relative to it.
struct Turning {
    const int64_t* pairs = nullptr;  // channels of each frequency, [2,F]
    const float* phases = nullptr;   // cosines and sines of each segment, [N,2,F]
    int64_t frequencies = 0, segment = 0;
    int64_t sequence = 0;  // numbers from the phases of one sequence to those of the next; 0: all have the same

    // Whether channels of one frequency after the other stand side by side, as most models have them.
    bool is_in_runs() const {
        for (int64_t f = 1; f < frequencies; f++) {
            if (pairs[f] != pairs[0] + f || pairs[frequencies + f] != pairs[frequencies] + f) return false;
        }
        return frequencies > 0;
    }

    void turn(const float* x, int64_t size, int64_t number, float* to, int64_t b = 0, bool runs = false) const {
        std::copy(x, x + size, to);
        const float *cos = phases + b * sequence + number * 2 * frequencies, *sin = cos + frequencies;
        if (runs) {
            const float *real = x + pairs[0], *imaginary = x + pairs[frequencies];
            float* __restrict first = to + pairs[0];
            float* __restrict second = to + pairs[frequencies];
            for (int64_t f = 0; f < frequencies; f++) {
                first[f] = real[f] * cos[f] - imaginary[f] * sin[f];
                second[f] = imaginary[f] * cos[f] + real[f] * sin[f];
            }
            return;
        }
        for (int64_t f = 0; f < frequencies; f++) {
            const int64_t real = pairs[f], imaginary = pairs[frequencies + f];
            to[real] = x[real] * cos[f] - x[imaginary] * sin[f];
            to[imaginary] = x[imaginary] * cos[f] + x[real] * sin[f];
        }
    }
};
