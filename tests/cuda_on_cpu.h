// CUDA's language for g++: each thread of a block is a fiber, so that shuffles see what all lanes of a warp have brought.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__ static
#define __launch_bounds__(n)

struct Index {
    unsigned x, y;
};
static Index threadIdx, blockIdx, blockDim;
using std::max;
using std::min;

static inline int __popc(unsigned v) { return __builtin_popcount(v); }

static inline int __dp4a(int a, int b, int sum)
{
    int8_t x[4], y[4];
    memcpy(x, &a, 4);
    memcpy(y, &b, 4);
    return sum + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
}

static inline float half_as_float(uint16_t h)
{
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float v = exponent == 0    ? std::ldexp((float)fraction, -24)
                    : exponent == 31 ? (fraction ? NAN : INFINITY)
                                     : std::ldexp((float)(1024 + fraction), exponent - 25);
    return h >> 15 ? -v : v;
}

// ---- a block of fibers

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
    int n_shuffles;
    uint32_t brought;
};
static Fiber fibers[1024];
static ucontext_t scheduler;

static void wait_for_the_others() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

template <typename Number> static Number __shfl_xor_sync(unsigned lanes, Number v, int mask)
{
    static_assert(sizeof v == 4);
    const unsigned me = threadIdx.x, from = me ^ mask;
    memcpy(&fibers[me].brought, &v, 4);
    const int n = ++fibers[me].n_shuffles;
    wait_for_the_others();
    if (lanes != ~0u || fibers[from].done || fibers[from].n_shuffles != n) {
        fprintf(stderr, "thread %u shuffles with a lane that is not at this shuffle\n", me);
        abort();
    }
    memcpy(&v, &fibers[from].brought, 4);
    wait_for_the_others();
    return v;
}

static void (*body)();

static void run_fiber()
{
    const unsigned me = threadIdx.x;
    body();
    fibers[me].done = true;
    swapcontext(&fibers[me].context, &scheduler);
}

static void run_block(int n_threads)
{
    for (int i = 0; i < n_threads; ++i) {
        Fiber& f = fibers[i];
        if (!f.stack)
            f.stack.reset(new char[1 << 16]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = 1 << 16;
        f.context.uc_link = nullptr;
        f.done = false;
        f.n_shuffles = 0;
        makecontext(&f.context, run_fiber, 0);
    }
    for (int left = n_threads; left;)
        for (int i = 0; i < n_threads; ++i)
            if (!fibers[i].done) {
                threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i].context);
                left -= fibers[i].done;
            }
}

static void** arguments;

template <typename... Args> static std::index_sequence_for<Args...> arity(void (*)(Args...)) { return {}; }

template <auto kernel, typename... Args, size_t... I> static void call(void (*)(Args...), std::index_sequence<I...>)
{
    kernel(*(Args*)arguments[I]...);
}

// As cuLaunchKernel: a grid of x times y blocks, pointers to the arguments.
template <auto kernel> static void launch(unsigned x, unsigned y, int n_threads, void** args)
{
    arguments = args;
    body = [] { call<kernel>(kernel, arity(kernel)); };
    blockDim = {(unsigned)n_threads, 1};
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            run_block(n_threads);
}
