"""The CUDA C++ of the copies between host memory and pages."""

from __future__ import annotations

UNIT_BYTES = 4096
"""What one warp copies at a time: 8 vectors of 16 bytes a lane."""

COPY_SOURCE = r"""
// One warp a unit. Units of a piece are adjacent and pieces follow the host block's order, so reads
// over PCIe are sequential; where they land does not matter to HBM at 512 bytes and more.
extern "C" __global__ void paged_copy(
    char* __restrict__ host, const long long* __restrict__ offsets,
    long long block_stride, const long long* __restrict__ bases,
    const long long* __restrict__ strides, const int* __restrict__ pages,
    long long units, int units_per_piece, int pages_per_block,
    int first_fragment, int fragments, long long piece_bytes, int store)
{
    const int lane = threadIdx.x & 31;
    const long long warps = (long long)gridDim.x * (blockDim.x >> 5);
    long long unit = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    for (; unit < units; unit += warps) {
        long long piece = unit / units_per_piece;
        const long long at = (unit % units_per_piece) * UNIT;
        const int page_index = (int)(piece % pages_per_block);
        piece /= pages_per_block;
        const int fragment = first_fragment + (int)(piece % fragments);
        const long long block = piece / fragments;
        char* near = host + (offsets ? offsets[block] : block * block_stride)
            + ((long long)fragment * pages_per_block + page_index) * piece_bytes + at;
        char* far = (char*)bases[fragment]
            + (long long)pages[block * pages_per_block + page_index] * strides[fragment] + at;
        const uint4* from = (const uint4*)(store ? far : near);
        uint4* to = (uint4*)(store ? near : far);
        const long long left = piece_bytes - at;
        const int vectors = (int)((left < UNIT ? left : UNIT) >> 4);
        if (vectors == UNIT / 16) {
            uint4 v[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) v[i] = __ldcs(from + lane + 32 * i);
            #pragma unroll
            for (int i = 0; i < 8; i++) to[lane + 32 * i] = v[i];
        } else {
            for (int i = lane; i < vectors; i += 32) to[i] = __ldcs(from + i);
        }
    }
}
""".replace("UNIT", str(UNIT_BYTES))


CONVERT_SOURCE = r"""
// As paged_copy, with eight values a lane: E4M3 in host memory, bf16 in the pages.
__device__ float2 decode2(unsigned short e4m3x2)
{
    unsigned int halves;
    float2 v;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(e4m3x2));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(v.x), "=f"(v.y) : "r"(halves));
    return v;
}
__device__ unsigned int bf16(float v)
{
    const unsigned int bits = __float_as_uint(v);
    return v != v ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
extern "C" __global__ void paged_convert(
    char* __restrict__ host, const long long* __restrict__ offsets,
    const long long* __restrict__ bases, const long long* __restrict__ strides,
    const int* __restrict__ pages, const float* __restrict__ scales, long long pieces,
    int pages_per_block, int first_fragment, int fragments, long long stored_bytes, int store)
{
    const int lane = threadIdx.x & 31;
    const long long warps = (long long)gridDim.x * (blockDim.x >> 5);
    long long number = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    for (; number < pieces; number += warps) {
        const int page_index = (int)(number % pages_per_block);
        const long long rest = number / pages_per_block;
        const int fragment = first_fragment + (int)(rest % fragments);
        const long long block = rest / fragments;
        const float scale = scales[fragment];
        uint2* near = (uint2*)(host + offsets[block]
            + ((long long)fragment * pages_per_block + page_index) * stored_bytes);
        uint4* far = (uint4*)((char*)bases[fragment]
            + (long long)pages[block * pages_per_block + page_index] * strides[fragment]);
        for (long long i = lane; i < stored_bytes / 8; i += 32) {
            if (store) {
                const uint4 v = far[i];
                const unsigned int in[4] = {v.x, v.y, v.z, v.w};
                unsigned short out[4];
                for (int k = 0; k < 4; k++) {
                    const float low = __uint_as_float(in[k] << 16) / scale;
                    const float high = __uint_as_float(in[k] & 0xFFFF0000u) / scale;
                    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
                        : "=h"(out[k]) : "f"(high), "f"(low));
                }
                near[i] = make_uint2(out[0] | (unsigned int)out[1] << 16,
                                     out[2] | (unsigned int)out[3] << 16);
            } else {
                const uint2 v = __ldcs(near + i);
                const unsigned int in[2] = {v.x, v.y};
                unsigned int out[4];
                for (int k = 0; k < 4; k++) {
                    const float2 f = decode2((unsigned short)(in[k / 2] >> 16 * (k % 2)));
                    out[k] = bf16(f.x * scale) | bf16(f.y * scale) << 16;
                }
                far[i] = make_uint4(out[0], out[1], out[2], out[3]);
            }
        }
    }
}
"""

__all__ = ["CONVERT_SOURCE", "COPY_SOURCE", "UNIT_BYTES"]
