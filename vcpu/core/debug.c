/*
 * Debug registers: SDM vol. 3 chapter 17. While DR7 enables anything, c->single has the run loop go instruction by
 * instruction with debug_before() and debug_after(); while it watches data, every access takes the slow path.
 */
#include "desc.h"

#define RW_EXECUTE 0u
#define RW_WRITE 1u
#define RW_IO 2u
#define RW_READ_WRITE 3u

static unsigned rw_of(const struct cpu *c, unsigned i) { return (ARCH(c)->dr[7] >> (16 + 4 * i)) & 3; }

static unsigned length_of(const struct cpu *c, unsigned i)
{
    static const uint8_t lengths[] = {1, 2, 8, 4}; /* table 17-2 */
    return lengths[(ARCH(c)->dr[7] >> (18 + 4 * i)) & 3];
}

void debug_update(struct cpu *c)
{
    uint32_t enabled = 0, data = 0;
    for (unsigned i = 0; i < 4; i++) {
        if (ARCH(c)->dr[7] >> (2 * i) & 3) {
            enabled |= 1u << i;
            data |= (rw_of(c, i) == RW_WRITE || rw_of(c, i) == RW_READ_WRITE) << i;
        }
    }
    c->sys.debug_enabled = enabled;
    c->sys.debug_data = data;
    c->single = enabled != 0;
    mmu_set_mode(c);
}

void debug_access(struct cpu *c, uint64_t lin, unsigned size, bool write)
{
    for (unsigned i = 0; i < 4; i++) {
        if (!(c->sys.debug_data >> i & 1) || (rw_of(c, i) == RW_WRITE && !write)) {
            continue;
        }
        uint64_t length = length_of(c, i), at = ARCH(c)->dr[i] & ~(length - 1);
        if (lin < at + length && at < lin + size) {
            c->sys.debug_hit |= 1u << i;
        }
    }
}

void debug_io(struct cpu *c, unsigned port, unsigned width)
{
    if (!c->sys.debug_enabled || !(ARCH(c)->cr4 & CR4_DE)) {
        return;
    }
    for (unsigned i = 0; i < 4; i++) {
        uint64_t length = length_of(c, i), at = ARCH(c)->dr[i] & ~(length - 1);
        if (c->sys.debug_enabled >> i & 1 && rw_of(c, i) == RW_IO && port < at + length && at < port + width) {
            c->sys.debug_hit |= 1u << i;
        }
    }
}

void debug_before(struct cpu *c)
{
    const struct cpu_arch *a = ARCH(c);
    if (a->rflags & FLAG_RF || a->inhibit & INHIBIT_MOV_SS) {
        return;
    }
    uint64_t lin = mode_64(c) ? a->rip : (uint32_t)(a->seg[CS].base + a->rip);
    uint32_t hit = 0;
    for (unsigned i = 0; i < 4; i++) {
        if (c->sys.debug_enabled >> i & 1 && rw_of(c, i) == RW_EXECUTE && a->dr[i] == lin) {
            hit |= 1u << i;
        }
    }
    if (hit) {
        ARCH(c)->dr[6] |= hit;
        raise_fault(c, NULL, VEC_DB);
    }
}

COLD _Noreturn void debug_trap(struct cpu *c, uint32_t dr6)
{
    ARCH(c)->dr[6] |= dr6;
    c->sys.debug_hit = 0;
    raise_trap(c, NULL, VEC_DB);
}

void debug_after(struct cpu *c, bool tf)
{
    struct cpu_arch *a = ARCH(c);
    if (a->inhibit & INHIBIT_MOV_SS) {
        return; /* what hit stays pending behind the next instruction (section 6.8.3) */
    }
    uint32_t hit = c->sys.debug_hit | (tf ? DR6_BS : 0);
    if (hit) {
        debug_trap(c, hit);
    }
}

/* ---- MOV to and from debug registers ---- */

/* The register that the instruction means; #UD for DR4 and DR5 with CR4.DE, #DB with GD */
static unsigned dr_number(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    unsigned n = u->reg & 15;
    if (n >= 8 || ((n == 4 || n == 5) && a->cr4 & CR4_DE)) {
        raise_fault(c, u, VEC_UD);
    }
    if (a->dr[7] & DR7_GD) {
        a->dr[6] |= DR6_BD;
        raise_fault(c, u, VEC_DB);
    }
    return n == 4 || n == 5 ? n + 2 : n;
}

void op_mov_from_dr(struct cpu *c, const struct uop *u)
{
    uint64_t value = ARCH(c)->dr[dr_number(c, u)];
    GPR(c, u->rm) = mode_64(c) ? value : (uint32_t)value;
    NEXT(c, u);
}

void op_mov_to_dr(struct cpu *c, const struct uop *u)
{
    unsigned n = dr_number(c, u);
    uint64_t value = mode_64(c) ? GPR(c, u->rm) : (uint32_t)GPR(c, u->rm);
    if (n >= 6 && value >> 32) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    if (n == 6) {
        value = (value & 0xe00f) | DR6_FIXED;
    } else if (n == 7) {
        value = (value & 0xffff2bff) | DR7_FIXED;
    }
    ARCH(c)->dr[n] = value;
    debug_update(c);
    NEXT(c, u);
}
