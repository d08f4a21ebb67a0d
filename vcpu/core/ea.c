/* Segment checks outside 64-bit mode: SDM vol. 3 sections 5.3 and 5.5; real mode section 20.1.1. */
#include "ea.h"
#include "system.h"

static _Noreturn void refuse(struct cpu *c, const struct uop *u, unsigned seg)
{
    raise_fault_code(c, u, seg == SS ? VEC_SS : VEC_GP, 0);
}

uint64_t seg_linear_checked(struct cpu *c, const struct uop *u, unsigned seg, uint64_t offset, unsigned n, bool write)
{
    const struct seg_reg *s = &ARCH(c)->seg[seg];
    unsigned type = s->attr & 15;
    bool data = !(type & 8);
    if (mode_protected(c) && !mode_vm86(c)) {
        bool usable = s->attr & 0x80 && s->attr & 0x10;
        bool allowed = write ? data && type & 2 : data || type & 2;
        if (!usable || !allowed) {
            refuse(c, u, seg);
        }
    }
    uint64_t last = offset + (n - 1);
    if (unlikely(data && type & 4)) { /* expands down: valid offsets lie above the limit */
        uint64_t top = s->attr & 0x4000 ? UINT32_MAX : UINT16_MAX;
        if (offset <= s->limit || last > top) {
            refuse(c, u, seg);
        }
    } else if (last > s->limit) {
        refuse(c, u, seg);
    }
    return (uint32_t)(s->base + offset);
}
