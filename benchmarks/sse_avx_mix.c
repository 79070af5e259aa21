/* What FBGEMM's run-time compiled row-wise Adagrad does per row, reduced to four instructions: scalar arithmetic after
 * the upper half of an AVX register was written, once in VEX form, once in legacy SSE form.
 *
 *     cc -O1 -mavx sse_avx_mix.c -o sse_avx_mix && ./sse_avx_mix
 */
#include <stdio.h>
#include <time.h>

#define RUNS 2000000
#define DIRTY_UPPER_HALF "vxorps %%ymm0, %%ymm0, %%ymm0\n vcmpps $0, %%ymm0, %%ymm0, %%ymm0\n"

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(void) {
    float x = 1.0f;
    double begin = now_ns();
    for (int i = 0; i < RUNS; i++)
        __asm__ volatile(DIRTY_UPPER_HALF "vmovss (%0), %%xmm1\n vaddss %%xmm1, %%xmm0, %%xmm0\n"
                         "vsqrtss %%xmm0, %%xmm0, %%xmm0\n vdivss %%xmm1, %%xmm0, %%xmm0" ::"r"(&x) : "xmm0", "xmm1");
    double middle = now_ns();
    for (int i = 0; i < RUNS; i++)
        __asm__ volatile(DIRTY_UPPER_HALF "movss (%0), %%xmm1\n addss %%xmm1, %%xmm0\n"
                         "sqrtss %%xmm0, %%xmm0\n divss %%xmm1, %%xmm0" ::"r"(&x) : "xmm0", "xmm1");
    double end = now_ns();
    printf("VEX %.1f ns, legacy SSE %.1f ns per four instructions\n", (middle - begin) / RUNS, (end - middle) / RUNS);
    return 0;
}
