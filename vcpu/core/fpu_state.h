/* Images of the FPU in memory, and the host's instructions for them. The guest's state is in the host's registers here. */
#ifndef ATOLL_FPU_STATE_H
#define ATOLL_FPU_STATE_H

#include "cpu.h"

#define MXCSR_DEFAULT 0x1f80u
#define MXCSR_MASK 0xffffu       /* all bits up to FTZ, with DAZ (SDM vol. 1 section 11.6.6) */
#define FCW_DEFAULT 0x37fu

struct fx_image {                /* SDM vol. 1 table 10-2, 64-bit pointers */
    uint16_t cw, sw;
    uint8_t tags, reserved0;
    uint16_t fop;
    uint64_t fip, fdp;           /* or offset32, selector16, reserved16 */
    uint32_t mxcsr, mxcsr_mask;
    uint8_t st[8][16];           /* in stack order */
    uint8_t xmm[16][16];
    uint8_t reserved1[96];
} __attribute__((aligned(16)));
_Static_assert(sizeof(struct fx_image) == 512, "FXSAVE area");

void fpu_store_image(struct fx_image *image);
void fpu_load_image(const struct fx_image *image);

/* Around a guest store that may give up its access and start again (a device): the instruction has been executed,
 * but its state does not hold before the store is done. */
#define STORE_WITH_STATE(before, store)        \
    do {                                       \
        struct fx_image after_;                \
        fpu_store_image(&after_);              \
        fpu_load_image(before);                \
        store;                                 \
        fpu_load_image(&after_);               \
    } while (0)

static inline uint32_t mxcsr_get(void)
{
    uint32_t value;
    __asm__ volatile("stmxcsr %0" : "=m"(value));
    return value;
}

static inline void mxcsr_set(uint32_t value) { __asm__ volatile("ldmxcsr %0" : : "m"(value)); }

#endif
