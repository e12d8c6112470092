#include "dispatch.h"

#include <cstring>

#include "amx_permission.h"

namespace saccade {

#define SACCADE_DECLARE(target) \
  namespace target {            \
  extern const Kernels kernels; \
  }
SACCADE_DECLARE(scalar)
#if defined(__x86_64__)
SACCADE_DECLARE(avx2)
SACCADE_DECLARE(avx512)
SACCADE_DECLARE(avx512_bf16)
#if !defined(SACCADE_WITHOUT_AMX)
SACCADE_DECLARE(amx)
#endif
SACCADE_DECLARE(amx_emulated)
#elif defined(__aarch64__)
SACCADE_DECLARE(neon)
#endif

namespace {

struct Usable {
  const Kernels* list[7] = {};
  Usable() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512vnni") &&
                       __builtin_cpu_supports("avx512bf16");
#if !defined(SACCADE_WITHOUT_AMX)
    if (pairs && ask_for_amx()) list[n++] = &amx::kernels;
#endif
    if (pairs) list[n++] = &avx512_bf16::kernels;
    if (avx512) list[n++] = &avx512::kernels;
    if (avx2) list[n++] = &avx2::kernels;
#elif defined(__aarch64__)
    list[n++] = &neon::kernels;
#endif
    list[n++] = &scalar::kernels;
#if defined(__x86_64__)
    if (pairs) list[n++] = &amx_emulated::kernels;  // for tests: last, so never chosen
#endif
  }
};

}  // namespace

const Kernels* const* usable_kernels() {
  static const Usable usable;
  return usable.list;
}

const Kernels* find_kernels(const char* name) {
  const Kernels* const* all = usable_kernels();
  if (!*name) return *all;
  for (; *all; ++all)
    if (std::strcmp((*all)->name, name) == 0) return *all;
  return nullptr;
}

}  // namespace saccade
