// The tile operations of amx.h in plain C++, as Intel's manual defines them (TDPBF16PS: even and
// odd channels are summed apart by fused multiply-adds, denormal numbers count as 0).
//
// Using a tile before it is configured ends the process, as the processor would.
#pragma once
#include <cmath>
#include <cstring>

namespace saccade::SACCADE_TARGET {

struct Tiles {
  bool configured = false;
  alignas(64) uint8_t rows[kNumTiles][kTileRows][kTileBytes];
};

static thread_local Tiles tiles;

SACCADE_INLINE void require_tiles() {
  if (!tiles.configured) __builtin_trap();
}

SACCADE_INLINE void configure_tiles() {
  tiles.configured = true;
  std::memset(tiles.rows, 0, sizeof tiles.rows);
}

SACCADE_INLINE void release_tiles() { tiles.configured = false; }

template <int T>
SACCADE_INLINE void zero_tile() {
  require_tiles();
  std::memset(tiles.rows[T], 0, sizeof tiles.rows[T]);
}

template <int T>
SACCADE_INLINE void load_tile(const void* p, int64_t stride) {
  require_tiles();
  for (int i = 0; i < kTileRows; ++i)
    std::memcpy(tiles.rows[T][i], (const char*)p + i * stride, kTileBytes);
}

template <int T>
SACCADE_INLINE void store_tile(void* p, int64_t stride) {
  require_tiles();
  for (int i = 0; i < kTileRows; ++i)
    std::memcpy((char*)p + i * stride, tiles.rows[T][i], kTileBytes);
}

SACCADE_INLINE float without_denormals(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? 0.f * x : x;
}

SACCADE_INLINE float bfloat16_at(const uint8_t* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return without_denormals(x);
}

SACCADE_NOINLINE static void multiply_rows(uint8_t (*c)[kTileBytes], const uint8_t (*a)[kTileBytes],
                                           const uint8_t (*b)[kTileBytes]) {
  for (int m = 0; m < kTileRows; ++m) {
    float sum[kTileDepth] = {};  // of even and odd channels, for each column
    for (int k = 0; k < kTileRows; ++k) {
      const float pair[2] = {bfloat16_at(a[m], 2 * k), bfloat16_at(a[m], 2 * k + 1)};
      for (int n = 0; n < kTileDepth; ++n)
        sum[n] = without_denormals(std::fma(pair[n % 2], bfloat16_at(b[k], n), sum[n]));
    }
    float row[kTileRows];
    std::memcpy(row, c[m], sizeof row);
    for (int n = 0; n < kTileRows; ++n) {
      const float both = without_denormals(sum[2 * n] + sum[2 * n + 1]);
      row[n] = without_denormals(without_denormals(row[n]) + both);
    }
    std::memcpy(c[m], row, sizeof row);
  }
}

template <int C, int A, int B>
SACCADE_INLINE void multiply_tiles() {
  require_tiles();
  multiply_rows(tiles.rows[C], tiles.rows[A], tiles.rows[B]);
}

}  // namespace saccade::SACCADE_TARGET
