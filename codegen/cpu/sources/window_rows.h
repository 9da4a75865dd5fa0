//: Rows of a residual window in 8 bits. Needs <algorithm>, <cmath> and <cstdint>.
// ------------------------------------------------------------------------------------------------ a window of 8 bits

// x[n], less `mean`, as 8-bit values with one scale, as fhopt.ops.packing.round_rows does. Half: of one float.
template <class T, class Half>
void round_row(const T* x, const float* mean, int64_t n, uint8_t* codes, Half& scale) {
    float largest = 0, unknown = 0;  // NaN where x has one
    for (int64_t i = 0; i < n; i++) {
        const float difference = std::abs(mean ? float(x[i]) - mean[i] : float(x[i]));
        largest = difference > largest ? difference : largest;
        unknown += difference == difference ? 0.0f : difference;
    }
    scale = Half(std::clamp(largest / 127.5f, 0x1p-24f, 65504.0f) + unknown);
    const float step = float(scale);
    for (int64_t i = 0; i < n; i++) {
        const float level = std::floor((mean ? float(x[i]) - mean[i] : float(x[i])) / step + 128.0f);
        codes[i] = uint8_t(level > 0 ? std::min(level, 255.0f) : 0.0f);
    }
}
