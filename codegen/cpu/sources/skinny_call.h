//: The struct by which skinny_linear.cpp is called, as other files know it.
struct Skinny {
    int64_t rows, width, columns, threads, type;
    const void* input;
    int64_t input_row;
    const void* weight;
    int64_t weight_row;
    const void* bias;
    void* output;
    const float* scale;
    int64_t is_float;
};
