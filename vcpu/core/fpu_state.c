/*
 * x87 and MXCSR state between struct x87_state and the host's registers, as an FXSAVE image (SDM vol. 1 section 10.5.1).
 */
#include "fpu_state.h"
#include "host.h"

void fpu_store_image(struct fx_image *image)
{
    __asm__ volatile("fxsave64 %0" : "=m"(*image));
}

void fpu_load_image(const struct fx_image *image)
{
    __asm__ volatile("fxrstor64 %0" : : "m"(*image)
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                       "xmm13", "xmm14", "xmm15");
}

void fpu_unpark(struct cpu *c)
{
    const struct x87_state *fpu = &ARCH(c)->fpu;
    struct fx_image image;
    memset(&image, 0, sizeof image);
    image.cw = fpu->cw;
    image.sw = fpu->sw;
    image.tags = fpu->tag_valid;
    image.mxcsr = fpu->mxcsr & MXCSR_MASK; /* a reserved bit would be a host fault */
    for (unsigned i = 0, top = fpu->sw >> 11 & 7; i < 8; i++) {
        memcpy(image.st[i], fpu->fpr[(top + i) & 7], 10);
    }
    fpu_load_image(&image);
}

void fpu_park(struct cpu *c)
{
    struct x87_state *fpu = &ARCH(c)->fpu;
    struct fx_image image;
    fpu_store_image(&image);
    fpu->cw = image.cw;
    fpu->sw = image.sw;
    fpu->tag_valid = image.tags;
    fpu->mxcsr = image.mxcsr;
    for (unsigned i = 0, top = image.sw >> 11 & 7; i < 8; i++) {
        memcpy(fpu->fpr[(top + i) & 7], image.st[i], 10);
    }
    const uint32_t abi_default = MXCSR_DEFAULT;
    __asm__ volatile("fninit; ldmxcsr %0" : : "m"(abi_default));
}
