//: The struct by which attention.cpp is called, as other files know it.
constexpr int PAGE_QUANTUM = $page_quantum;

struct Rows {
    const void* data = nullptr;
    int64_t strides[3] = {};
};

struct Extent {
    const uint8_t* data;
    int64_t bytes;
};

struct Attention {
    int64_t batch, heads, queries, tokens, key_heads, value_heads, threads, mask_kind;
    Rows query, key, key_scale, value, value_scale, mask;
    int64_t mask_token;
    Rows pages;
    int64_t page_heads, page_count, page_tokens;
    void *output, *lse;
    double scale, softcap;
    const void* kernel;  // the table of the latents
    int64_t digits;      // of queries and weights, see attention.cpp
    const Extent* later = nullptr;  // what the thread reads after this call: fetched meanwhile
    int64_t later_count = 0;
    // Tokens in segments, each read by queries of its own: from one segment's to the next, and what is added to logits.
    int64_t segment = 0, query_segment = 0;
    const float* shift = nullptr;  // [segments, B, H, S], dense
};
