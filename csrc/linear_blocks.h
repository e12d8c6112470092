// The blocks of a GGUF file, unpacked to one byte a number.
#pragma once
#include "linear_simd.h"

namespace saccade::SACCADE_TARGET {

// A run of a row: at most 256 numbers in at most 16 groups.
struct Unpacked {
  uint8_t q[256];
  float scale[16], minimum[16];
};

SACCADE_INLINE float half_at(const uint8_t* p) {
  F16 lanes[W] = {};
  std::memcpy(lanes, p, 2);
  alignas(64) float wide[W];
  store(wide, load(lanes));
  return wide[0];
}

// n bytes: low nibbles to q, high ones to q + n.
SACCADE_INLINE void unpack_nibbles(const uint8_t* p, int n, uint8_t* q) {
  for (int i = 0; i < n; ++i) {
    q[i] = p[i] & 15;
    q[n + i] = p[i] >> 4;
  }
}

SACCADE_INLINE void unpack_q4(const uint8_t* p, bool with_minimum, Unpacked& u) {
  u.scale[0] = half_at(p);
  if (with_minimum) u.minimum[0] = half_at(p + 2);
  unpack_nibbles(p + (with_minimum ? 4 : 2), 16, u.q);
}

SACCADE_INLINE void unpack_q5(const uint8_t* p, bool with_minimum, Unpacked& u) {
  u.scale[0] = half_at(p);
  if (with_minimum) u.minimum[0] = half_at(p + 2);
  p += with_minimum ? 4 : 2;
  uint32_t fifth;
  std::memcpy(&fifth, p, sizeof fifth);
  unpack_nibbles(p + 4, 16, u.q);
  const uint8_t centre = with_minimum ? 0 : 16;  // the packed form's is 32
  for (int i = 0; i < 32; ++i) u.q[i] = (uint8_t)((u.q[i] | (fifth >> i & 1) << 4) + centre);
}

SACCADE_INLINE void unpack_q8_0(const uint8_t* p, Unpacked& u) {
  u.scale[0] = half_at(p);
  std::memcpy(u.q, p + 2, 32);
}

// Scales and minima of eight groups, 6 bits each in 12 bytes, after two float16 factors.
SACCADE_INLINE void unpack_k_scales(const uint8_t* p, Unpacked& u) {
  const float d = half_at(p), m = half_at(p + 2);
  const uint8_t* s = p + 4;
  for (int j = 0; j < 4; ++j) {
    u.scale[j] = d * (float)(s[j] & 63);
    u.minimum[j] = -(m * (float)(s[j + 4] & 63));
    u.scale[j + 4] = d * (float)((s[j + 8] & 15) | (s[j] >> 6) << 4);
    u.minimum[j + 4] = -(m * (float)((s[j + 8] >> 4) | (s[j + 4] >> 6) << 4));
  }
}

SACCADE_INLINE void unpack_q4_k(const uint8_t* p, Unpacked& u) {
  unpack_k_scales(p, u);
  for (int j = 0; j < 4; ++j) unpack_nibbles(p + 16 + 32 * j, 32, u.q + 64 * j);
}

SACCADE_INLINE void unpack_q5_k(const uint8_t* p, Unpacked& u) {
  unpack_k_scales(p, u);
  for (int j = 0; j < 4; ++j) unpack_nibbles(p + 48 + 32 * j, 32, u.q + 64 * j);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i) u.q[32 * j + i] |= (uint8_t)((p[16 + i] >> j & 1) << 4);
}

SACCADE_INLINE void unpack_q6_k(const uint8_t* p, Unpacked& u) {
  const float d = half_at(p + 208);
  for (int j = 0; j < 16; ++j) u.scale[j] = d * (float)(int8_t)p[192 + j];
  for (int j = 0; j < 2; ++j) unpack_nibbles(p + 64 * j, 64, u.q + 128 * j);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i) {
      const int upper = p[128 + j / 4 * 32 + i] >> 2 * (j % 4) & 3;
      u.q[32 * j + i] |= (uint8_t)(upper << 4);
    }
}

SACCADE_INLINE void unpack_block(BlockKind kind, const uint8_t* p, Unpacked& u) {
  switch (kind) {
    case BlockKind::q4_0: return unpack_q4(p, false, u);
    case BlockKind::q4_1: return unpack_q4(p, true, u);
    case BlockKind::q5_0: return unpack_q5(p, false, u);
    case BlockKind::q5_1: return unpack_q5(p, true, u);
    case BlockKind::q8_0: return unpack_q8_0(p, u);
    case BlockKind::q4_k: return unpack_q4_k(p, u);
    case BlockKind::q5_k: return unpack_q5_k(p, u);
    default: return unpack_q6_k(p, u);
  }
}

}  // namespace saccade::SACCADE_TARGET
