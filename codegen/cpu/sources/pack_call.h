//: The struct by which packing.cpp is called, as other files know it. Stands behind kernel_call.h.
struct Pack {
    int64_t shape[3], threads, type;
    const void* tiers;
    int64_t count, width;
    Rows latent, codes, scale;
};
