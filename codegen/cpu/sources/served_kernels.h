// The kernels that ops call, as Python makes them known.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernel_call.h"
#include "pack_call.h"
#include "skinny_call.h"

namespace {

struct ServedKernel {
    void (*run)(const Attention*);
    const void* table;
    int64_t key_width, value_width, flags;

    bool scaled(int side) const { return flags >> side & 1; }
};

std::unordered_map<std::string, ServedKernel> kernels;
std::shared_mutex guard;
void (*run_pack)(const Pack*) = nullptr;
void (*run_skinny)(const Skinny*) = nullptr;  // of any rows, made for few
int64_t most_skinny = 0;
std::atomic<bool> has_blocks{false};  // `run_skinny` multiplies with weights in the blocks of GGUF files
std::atomic<void (*)(const Skinny*)> run_wide{nullptr};  // of more than `most_skinny`, where that is faster

void expect(bool holds, const std::string& name, const char* what) {
    if (!holds) throw std::runtime_error("fhopt: the kernel " + name + " was called with " + what);
}

ServedKernel find(const std::string& name) {
    std::shared_lock lock(guard);
    const auto found = kernels.find(name);
    expect(found != kernels.end(), name, "a name that nothing was built for; compile the graph again");
    return found->second;
}

}  // namespace

extern "C" void fhopt_serve(const char* name, void (*run)(const Attention*), const void* table, int64_t key_width,
                            int64_t value_width, int64_t flags) {
    std::unique_lock lock(guard);
    kernels[name] = {run, table, key_width, value_width, flags};
}

extern "C" void fhopt_serve_pack(void (*run)(const Pack*)) { run_pack = run; }

extern "C" void fhopt_serve_skinny(void (*run)(const Skinny*), int64_t most) { most_skinny = most, run_skinny = run; }

extern "C" void fhopt_serve_blocks() { has_blocks = true; }

extern "C" void fhopt_serve_wide(void (*run)(const Skinny*)) { run_wide = run; }
