/* SSE instructions that are no stub: LDMXCSR checks its operand, MASKMOVQ and MASKMOVDQU store single bytes. */
#include "ea.h"
#include "fpu_state.h"
#include "host.h"
#include "mem.h"

void op_ldmxcsr(struct cpu *c, const struct uop *u)
{
    fpu_gate(c, u, GATE_SSE);
    uint32_t value = mem_read32(c, u, ea_linear(c, u, 4, false));
    if (value & ~MXCSR_MASK) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    mxcsr_set(value);
    NEXT(c, u);
}

/* Bytes of value whose mask byte has its top bit set go to DS:rDI; all of them can be written, or none is. */
static COLD void store_masked(struct cpu *c, const struct uop *u, const uint8_t *value, const uint8_t *mask, unsigned n)
{
    uint64_t offset = GPR(c, RDI);
    offset = u->mode & UOP_ASZ32 ? (uint32_t)offset : u->mode & UOP_ASZ16 ? (uint16_t)offset : offset;
    uint64_t lin = seg_linear(c, u, u->seg, offset, n, true);
    if (n == 8) {
        host_align(c, u, lin, n);
    }
    unsigned first = 0, end = n;
    while (first < n && !(mask[first] & 0x80)) {
        first++;
    }
    while (end > first && !(mask[end - 1] & 0x80)) {
        end--;
    }
    if (first == n) {
        return;
    }
    mem_probe_write(c, u, lin + first, end - first);
    for (unsigned i = first; i < end; i++) {
        if (mask[i] & 0x80) {
            mem_write8(c, u, lin + i, value[i]);
        }
    }
}

void op_maskmovdqu(struct cpu *c, const struct uop *u)
{
    fpu_gate(c, u, GATE_SSE);
    store_masked(c, u, ARCH(c)->vec[u->reg].b, ARCH(c)->vec[u->rm].b, 16);
    NEXT(c, u);
}

static COLD void maskmovq(struct cpu *c, const struct uop *u)
{
    struct fx_image image;
    uint64_t first;
    fpu_gate(c, u, GATE_MMX);
    fpu_wait(c, u);
    fpu_store_image(&image);
    unsigned top = image.sw >> 11 & 7;
    store_masked(c, u, image.st[(u->reg - top) & 7], image.st[(u->rm - top) & 7], 8);
    __asm__ volatile("movq %%mm0, %0" : "=r"(first)); /* as any MMX instruction: top = 0, no register empty */
}

void op_maskmovq(struct cpu *c, const struct uop *u)
{
    maskmovq(c, u);
    NEXT(c, u);
}
