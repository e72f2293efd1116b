// Matrix times vector with packed weights, for GPUs without tensor cores that read them: y [M, N] = x [M, K] times w [N, K].
//
// sm_52 has neither dp4a nor arithmetic in halves, sm_61 has halves at 1/64 of its rate. So halves are memory only: they are
// widened as they are loaded, and everything is added up in int32 or f32.
//
// Columns are taken in units (8, or 32 of one bit), and a group is a whole number of units; G = ceil(K / group), the last group
// may be short. Bits and codes beyond column K are 0. Grid (ceil(N / 4), M), 128 threads: a warp makes one y.

typedef unsigned short half_bits;
typedef unsigned char u8;
typedef unsigned int u32;

#define WARPS 4
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS)

__device__ float widened(half_bits h)
{
#ifdef __CUDACC__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#else
    return half_as_float(h);
#endif
}

// sum + four products of bytes: codes below 128 and signed activations
__device__ int dot4(int codes, int x, int sum)
{
#if __CUDA_ARCH__ >= 610
    return __dp4a(codes, x, sum);
#else
    for (int i = 0; i < 32; i += 8)
        sum += (codes >> i & 127) * (signed char)(x >> i);
    return sum;
#endif
}

template <typename Number> __device__ Number warp_sum(Number v)
{
    for (int lane = 16; lane; lane >>= 1)
        v += __shfl_xor_sync(~0u, v, lane);
    return v;
}

__device__ float warp_max(float v)
{
    for (int lane = 16; lane; lane >>= 1)
        v = fmaxf(v, __shfl_xor_sync(~0u, v, lane));
    return v;
}

__device__ int warp() { return blockIdx.x * WARPS + threadIdx.x / 32; }
__device__ int lane() { return threadIdx.x % 32; }
__device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Sum over a row's units of term(unit, group, whether it is the group's first). No division within the loop.
template <int UNIT, typename Term> __device__ float row_sum(int K, int group, Term term)
{
    const int per_group = group / UNIT, n_units = ceil_div(K, UNIT), groups = 32 / per_group, units = 32 % per_group;
    int g = lane() / per_group, at = lane() % per_group;
    float sum = 0;
    for (int unit = lane(); unit < n_units; unit += 32) {
        sum += term(unit, g, at == 0);
        g += groups;
        at += units;
        if (at >= per_group) {
            at -= per_group;
            ++g;
        }
    }
    return warp_sum(sum);
}

// ---- activations

// x f16[M,K] -> q i8[M, K padded to 16], t f32[M,G] with x ~ q t, and sums i32[M,G] of q. Grid (ceil(G / 4), M).
// even_odd: of each 8 columns 0 2 4 6 come first, then 1 3 5 7, as the halves of bytes of 4-bit codes want them.
KERNEL quantize_x(const half_bits* x, int K, int group, int even_odd, signed char* q, float* t, int* sums)
{
    const int g = warp(), m = blockIdx.y, G = ceil_div(K, group), stride = ceil_div(K, 16) * 16;
    if (g >= G)
        return;
    const int first = g * group, stop = min(first + group, K), end = g == G - 1 ? stride : stop;
    x += (long long)m * K;
    q += (long long)m * stride;
    float peak = 0;
    for (int k = first + lane(); k < stop; k += 32)
        peak = fmaxf(peak, fabsf(widened(x[k])));
    peak = warp_max(peak);
    const float inverse = peak > 0 ? 127 / peak : 0;
    int sum = 0;
    for (int k = first + lane(); k < end; k += 32) {
        const int code = k < stop ? (int)rintf(widened(x[k]) * inverse) : 0;
        q[even_odd ? (k & ~7) | (k & 1) << 2 | (k & 7) >> 1 : k] = code;
        sum += code;
    }
    sum = warp_sum(sum);
    if (lane() == 0) {
        t[(long long)m * G + g] = peak / 127;
        sums[(long long)m * G + g] = sum;
    }
}

// x f16[M,K] -> sums f32[M,G] of its groups. Grid (ceil(G / 4), M).
KERNEL sum_groups(const half_bits* x, int K, int group, float* sums)
{
    const int g = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (g >= G)
        return;
    float sum = 0;
    for (int k = g * group + lane(); k < min(g * group + group, K); k += 32)
        sum += widened(x[(long long)m * K + k]);
    sum = warp_sum(sum);
    if (lane() == 0)
        sums[(long long)m * G + g] = sum;
}

// ---- 4-bit affine codes: y = sum over groups of s (sum of q x - z sum of x), codes u32[N, ceil(K/8)], s f16[N,G]

enum Zero { CENTRE, POINTS, MINIMA };  // w = s (q - 8); s (q - z), z u8[N,G]; s q + m, m f16[N,G]

// A group's part of y: dot of codes and activations, and the activations' sum where it is to be counted
template <Zero ZERO, typename Number>
__device__ float affine(half_bits s, const void* zeros, long long group, Number dot, Number sum)
{
    if (ZERO == MINIMA)
        return widened(s) * dot + widened(((const half_bits*)zeros)[group]) * sum;
    return widened(s) * (dot - (ZERO == POINTS ? ((const u8*)zeros)[group] : 8) * sum);
}

// codes: nibble i of a word is column 8 word + i; x: two words of quantize_x's even_odd bytes
__device__ int dot_w4(u32 codes, const int* x)
{
    return dot4(codes >> 4 & 0x0f0f0f0f, x[1], dot4(codes & 0x0f0f0f0f, x[0], 0));
}

template <Zero ZERO> __device__ void w4a8(const u32* codes, const half_bits* s, const void* zeros, const int* x, const float* t,
                                          const int* sums, float* y, int N, int K, int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (n >= N)
        return;
    const long long row = (long long)n * G;
    codes += (long long)n * ceil_div(K, 8);
    x += (long long)m * ceil_div(K, 16) * 4;
    t += (long long)m * G;
    sums += (long long)m * G;
    const float sum = row_sum<8>(K, group, [&](int unit, int g, bool first) {
        return t[g] * affine<ZERO>(s[row + g], zeros, row + g, dot_w4(codes[unit], x + 2 * unit), first ? sums[g] : 0);
    });
    if (lane() == 0)
        y[(long long)m * N + n] = sum;
}

template <Zero ZERO> __device__ void w4a16(const u32* codes, const half_bits* s, const void* zeros, const half_bits* x,
                                           const float* sums, float* y, int N, int K, int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (n >= N)
        return;
    const long long row = (long long)n * G;
    codes += (long long)n * ceil_div(K, 8);
    x += (long long)m * K;
    sums += (long long)m * G;
    const float sum = row_sum<8>(K, group, [&](int unit, int g, bool first) {
        float dot = 0;
        for (int i = 0; i < min(8, K - 8 * unit); ++i)
            dot += (float)(codes[unit] >> 4 * i & 15) * widened(x[8 * unit + i]);
        return affine<ZERO>(s[row + g], zeros, row + g, dot, first ? sums[g] : 0);
    });
    if (lane() == 0)
        y[(long long)m * N + n] = sum;
}

// x and t and sums of quantize_x (even_odd) -> y f32[M,N]
KERNEL w4a8_centre(const u32* codes, const half_bits* s, const int* x, const float* t, const int* sums,
                   float* y, int N, int K, int group)
{
    w4a8<CENTRE>(codes, s, 0, x, t, sums, y, N, K, group);
}

KERNEL w4a8_points(const u32* codes, const half_bits* s, const u8* z, const int* x, const float* t, const int* sums,
                   float* y, int N, int K, int group)
{
    w4a8<POINTS>(codes, s, z, x, t, sums, y, N, K, group);
}

KERNEL w4a8_minima(const u32* codes, const half_bits* s, const half_bits* m, const int* x, const float* t, const int* sums,
                   float* y, int N, int K, int group)
{
    w4a8<MINIMA>(codes, s, m, x, t, sums, y, N, K, group);
}

// The same with x f16[M,K] and sums of sum_groups
KERNEL w4a16_centre(const u32* codes, const half_bits* s, const half_bits* x, const float* sums, float* y, int N,
                    int K, int group)
{
    w4a16<CENTRE>(codes, s, 0, x, sums, y, N, K, group);
}

KERNEL w4a16_points(const u32* codes, const half_bits* s, const u8* z, const half_bits* x, const float* sums, float* y, int N,
                    int K, int group)
{
    w4a16<POINTS>(codes, s, z, x, sums, y, N, K, group);
}

KERNEL w4a16_minima(const u32* codes, const half_bits* s, const half_bits* m, const half_bits* x, const float* sums, float* y,
                    int N, int K, int group)
{
    w4a16<MINIMA>(codes, s, m, x, sums, y, N, K, group);
}

// The integers of w4a8: dots i32[M,N,G] of codes and activations. Grid (ceil(N G / 128), M).
KERNEL w4a8_dots(const u32* codes, const int* x, int* dots, int N, int K, int group)
{
    const int G = ceil_div(K, group), i = blockIdx.x * blockDim.x + threadIdx.x, n = i / G, g = i % G, m = blockIdx.y;
    if (n >= N)
        return;
    int sum = 0;
    for (int unit = g * (group / 8); unit < min((g + 1) * (group / 8), ceil_div(K, 8)); ++unit)
        sum += dot_w4(codes[(long long)n * ceil_div(K, 8) + unit], x + (long long)m * ceil_div(K, 16) * 4 + 2 * unit);
    dots[((long long)m * N + n) * G + g] = sum;
}

// ---- one bit

// Bits of -1 (0) and +1 (1) on both sides: y = t sum over groups of s (columns - 2 popc(w xor x))
template <int UNIT, typename Word> __device__ void b1a1(const Word* bits, const half_bits* s, const Word* x, const float* t,
                                                        float* y, int N, int K, int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group), n_units = ceil_div(K, UNIT);
    if (n >= N)
        return;
    const float sum = row_sum<UNIT>(K, group, [&](int unit, int g, bool) {
        const u32 differ = bits[(long long)n * n_units + unit] ^ x[(long long)m * n_units + unit];
        return widened(s[(long long)n * G + g]) * (min(UNIT, K - UNIT * unit) - 2 * __popc(differ));
    });
    if (lane() == 0)
        y[(long long)m * N + n] = t[m] * sum;
}

// bits u8[N, ceil(K/8)], s f16[N,G], x u8[M, ceil(K/8)], t f32[M] -> y f32[M,N]; bit i of a byte is column 8 byte + i
KERNEL b1a1_bytes(const u8* bits, const half_bits* s, const u8* x, const float* t, float* y, int N, int K, int group)
{
    b1a1<8>(bits, s, x, t, y, N, K, group);
}

// the same in words of 32 bits, for groups of a multiple of 32
KERNEL b1a1_words(const u32* bits, const half_bits* s, const u32* x, const float* t, float* y, int N, int K, int group)
{
    b1a1<32>(bits, s, x, t, y, N, K, group);
}

// Bits of 0 and 1 with scale and offset: y = sum over groups of s (sum of x where 1) + m (sum of x). Additions, and two FMA a
// group.
// bits u8[N, ceil(K/8)], s and offset f16[N,G], x f16[M,K], sums of sum_groups -> y f32[M,N]
KERNEL b1a16(const u8* bits, const half_bits* s, const half_bits* offset, const half_bits* x, const float* sums, float* y, int N,
             int K, int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (n >= N)
        return;
    x += (long long)m * K;
    const long long row = (long long)n * G;
    const float sum = row_sum<8>(K, group, [&](int unit, int g, bool first) {
        const u32 byte = bits[(long long)n * ceil_div(K, 8) + unit];
        float ones = 0;
        for (int i = 0; i < min(8, K - 8 * unit); ++i)
            if (byte >> i & 1)
                ones += widened(x[8 * unit + i]);
        const float rest = first ? widened(offset[row + g]) * sums[(long long)m * G + g] : 0;
        return widened(s[row + g]) * ones + rest;
    });
    if (lane() == 0)
        y[(long long)m * N + n] = sum;
}

// ---- ternary: codes 0 1 2 of -1 0 +1, 16 columns a word: byte b has columns b, 4 + b, 8 + b, 12 + b from its lowest bits up

// the 8 codes of half a word, as quantize_x's plain bytes want them
__device__ int dot_w2(u32 word, int unit, const int* x)
{
    const u32 codes = word >> 4 * (unit & 1);
    return dot4(codes >> 2 & 0x03030303, x[1], dot4(codes & 0x03030303, x[0], 0));
}

// codes u32[N, ceil(K/16)], s f16[N,G], x and t and sums of quantize_x (plain) -> y f32[M,N] = sum of s t (sum of q x - sum of x)
KERNEL w2a8(const u32* codes, const half_bits* s, const int* x, const float* t, const int* sums, float* y, int N, int K,
            int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (n >= N)
        return;
    codes += (long long)n * ceil_div(K, 16);
    x += (long long)m * ceil_div(K, 16) * 4;
    const float sum = row_sum<8>(K, group, [&](int unit, int g, bool first) {
        const int dot = dot_w2(codes[unit / 2], unit, x + 2 * unit) - (first ? sums[(long long)m * G + g] : 0);
        return t[(long long)m * G + g] * widened(s[(long long)n * G + g]) * dot;
    });
    if (lane() == 0)
        y[(long long)m * N + n] = sum;
}

// The integers of w2a8: i32[M,N,G], sum of x where +1 less sum of x where -1. Grid (ceil(N G / 128), M).
KERNEL w2a8_dots(const u32* codes, const int* x, const int* sums, int* dots, int N, int K, int group)
{
    const int G = ceil_div(K, group), i = blockIdx.x * blockDim.x + threadIdx.x, n = i / G, g = i % G, m = blockIdx.y;
    if (n >= N)
        return;
    int sum = -sums[(long long)m * G + g];
    for (int unit = g * (group / 8); unit < min((g + 1) * (group / 8), ceil_div(K, 8)); ++unit)
        sum += dot_w2(codes[(long long)n * ceil_div(K, 16) + unit / 2], unit, x + (long long)m * ceil_div(K, 16) * 4 + 2 * unit);
    dots[((long long)m * N + n) * G + g] = sum;
}

// The same codes with x f16[M,K], by additions: y f32[M,N] = sum over groups of s (sum of x where +1 less sum of x where -1)
KERNEL w2a16(const u32* codes, const half_bits* s, const half_bits* x, float* y, int N, int K, int group)
{
    const int n = warp(), m = blockIdx.y, G = ceil_div(K, group);
    if (n >= N)
        return;
    x += (long long)m * K;
    const float sum = row_sum<8>(K, group, [&](int unit, int g, bool) {
        const u32 word = codes[(long long)n * ceil_div(K, 16) + unit / 2] >> 4 * (unit & 1);
        float signed_sum = 0;
        for (int i = 0; i < min(8, K - 8 * unit); ++i) {
            const u32 code = word >> (8 * (i % 4) + 2 * (i / 4)) & 3;
            const float v = widened(x[8 * unit + i]);
            signed_sum += code == 2 ? v : code == 0 ? -v : 0;
        }
        return widened(s[(long long)n * G + g]) * signed_sum;
    });
    if (lane() == 0)
        y[(long long)m * N + n] = sum;
}
