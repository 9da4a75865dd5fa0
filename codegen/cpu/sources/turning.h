//: Keys that are relative to segments. Needs <algorithm> and <cstdint>.
// How queries turn to read the keys of a segment, and these to be relative to it.
struct Turning {
    const int64_t* pairs = nullptr;  // channels of each frequency, [2,F]
    const float* phases = nullptr;   // cosines and sines of each segment, [N,2,F]
    int64_t frequencies = 0, segment = 0;
    int64_t sequence = 0;  // numbers from the phases of one sequence to those of the next; 0: all have the same

    void turn(const float* x, int64_t size, int64_t number, float* to, int64_t b = 0) const {
        std::copy(x, x + size, to);
        const float *cos = phases + b * sequence + number * 2 * frequencies, *sin = cos + frequencies;
        for (int64_t f = 0; f < frequencies; f++) {
            const int64_t real = pairs[f], imaginary = pairs[frequencies + f];
            to[real] = x[real] * cos[f] - x[imaginary] * sin[f];
            to[imaginary] = x[imaginary] * cos[f] + x[real] * sin[f];
        }
    }
};
