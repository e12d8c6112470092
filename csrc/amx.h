// AMX: eight tile registers of 16 rows of 64 bytes, and the product of tiles of bfloat16 pairs.
//
// In assembler, because the compilers' intrinsics take no template parameter for a register and
// some versions do not say that they read memory.  amx_emulated.h has the same functions in plain
// C++, for tests on machines without AMX.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(SACCADE_AMX)
namespace saccade::SACCADE_TARGET {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;   // of a row
constexpr int kTileDepth = 32;   // bfloat16 of a row
constexpr int kNumTiles = 8;

}  // namespace saccade::SACCADE_TARGET

#if defined(SACCADE_AMX_EMULATED)
#include "amx_emulated.h"
#else
namespace saccade::SACCADE_TARGET {

// The memory operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// All tiles at their full size, for the calling thread.
SACCADE_INLINE void configure_tiles() {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) {
    config.row_bytes[t] = kTileBytes;
    config.rows[t] = kTileRows;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

SACCADE_INLINE void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
SACCADE_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// `stride`: bytes from row to row.
template <int T>
SACCADE_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T>
SACCADE_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

// C += A B: A holds 16 rows of 32 bfloat16, B sixteen rows of 16 pairs, C sixteen rows of 16 floats.
template <int C, int A, int B>
SACCADE_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace saccade::SACCADE_TARGET
#endif
#endif
