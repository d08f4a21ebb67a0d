/* What stubs call: memory operands that miss the TLB or need segment checks, x87 pointers, flags. */
#include "ea.h"
#include "flags.h"
#include "host.h"
#include "mem.h"
#include "system.h"

/* 16-byte operands of most SSE instructions: SDM vol. 1 section 10.4.1.1 */
static void check_alignment(struct cpu *c, const struct uop *u, uint64_t lin, uint32_t desc)
{
    if (desc & MEM_ALIGNED && lin & 15) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

void host_align(struct cpu *c, const struct uop *u, uint64_t lin, unsigned align)
{
    if (lin & (align - 1) && ARCH(c)->cpl == 3 && ARCH(c)->rflags & FLAG_AC && ARCH(c)->cr0 & CR0_AM) {
        raise_fault_code(c, u, VEC_AC, 0);
    }
}

/* Host address of the operand at lin: its own, or that of the bounce buffer. Faults as the access would. */
static void *operand_at(struct cpu *c, const struct uop *u, uint64_t lin, uint32_t desc)
{
    unsigned n = desc & 0xff;
    bool write = desc & MEM_WRITE;
    const struct tlb_entry *e = tlb_slot(c, lin);
    if (write ? tlb_writes(e, lin, n) : tlb_reads(e, lin, n)) {
        return (void *)(lin + e->addend);
    }
    if (canonical(lin) && canonical(lin + (n - 1))) {
        host_align(c, u, lin, n == 10 ? 8 : n <= 8 ? n : 1); /* SDM vol. 3 table 6-7; 16 bytes: as the CPUs do */
    }
    if (write) {
        c->stubs->store_lin = lin;
        mem_probe_write(c, u, lin, n);
        if (desc & MEM_WAITS) {
            fpu_store_image(&c->stubs->before);
        }
    } else {
        mem_read_bytes(c, u, lin, c->stubs->bounce, n);
    }
    return c->stubs->bounce;
}

/* Inline address, TLB miss */
void *host_miss(struct cpu *c, const struct uop *u, uint64_t lin, uint32_t desc)
{
    if (desc & MEM_WAITS) {
        fpu_wait(c, u);
    }
    if (!(c->mode & MODE_64)) {
        lin = ea_linear(c, u, desc & 0xff, desc & MEM_WRITE); /* it may reach over the limit of 4 GiB */
    } else if (!canonical(lin)) {
        raise_fault_code(c, u, u->seg == SS ? VEC_SS : VEC_GP, 0);
    }
    check_alignment(c, u, lin, desc);
    return operand_at(c, u, lin, desc);
}

/* Any mode, any address size */
void *host_operand(struct cpu *c, const struct uop *u, uint32_t desc)
{
    if (desc & MEM_WAITS) {
        fpu_wait(c, u);
    }
    uint64_t lin = ea_linear(c, u, desc & 0xff, desc & MEM_WRITE);
    if (c->mode & MODE_64 && !canonical(lin)) {
        raise_fault_code(c, u, u->seg == SS ? VEC_SS : VEC_GP, 0);
    }
    check_alignment(c, u, lin, desc);
    return operand_at(c, u, lin, desc);
}

/* Has the x87 store just executed left its operand alone? Of unmasked exceptions only precision comes with a result
 * (SDM vol. 1 sections 8.5.4 to 8.5.6); there was none before, the instruction would have waited. */
static bool x87_stored_nothing(void)
{
    uint16_t sw, cw;
    __asm__ volatile("fnstsw %0; fnstcw %1" : "=a"(sw), "=m"(cw));
    return sw & ~cw & 0x1f; /* IE DE ZE OE UE */
}

/* Behind a store to what operand_at() gave */
void host_stored(struct cpu *c, const struct uop *u, void *to, uint32_t desc)
{
    if (to != c->stubs->bounce) {
        code_check(c, to, desc & 0xff);
    } else if (!(desc & MEM_WAITS)) {
        mem_write_bytes(c, u, c->stubs->store_lin, to, desc & 0xff);
    } else if (!x87_stored_nothing()) {
        STORE_WITH_STATE(&c->stubs->before, mem_write_bytes(c, u, c->stubs->store_lin, to, desc & 0xff));
    }
}

void host_code_written(struct cpu *c, const struct uop *u, void *to, uint32_t desc)
{
    (void)u;
    code_written(c, (uint64_t)((uint8_t *)to - c->guest), desc & 0xff);
}

uint32_t host_status_flags(struct cpu *c) { return (uint32_t)flags_get(c) & FLAGS_STATUS; }

/* x87 pointers outside 64-bit mode */
void host_note_pointers(struct cpu *c, const struct uop *u, uint32_t fop, uint32_t memory)
{
    struct x87_state *fpu = &ARCH(c)->fpu;
    fpu->fop = (uint16_t)fop;
    fpu->fip = uop_rip(c, u);
    fpu->fcs = ARCH(c)->seg[CS].selector;
    if (memory) {
        fpu->fdp = ea_offset(c, u);
        fpu->fds = u->seg < SEG_NONE ? ARCH(c)->seg[u->seg].selector : 0;
    }
}

void fpu_gate(struct cpu *c, const struct uop *u, enum fpu_gate gate)
{
    uint64_t cr0 = ARCH(c)->cr0, cr4 = ARCH(c)->cr4;
    switch (gate) {
    case GATE_NONE:
        return;
    case GATE_WAIT:
        if ((cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS)) {
            raise_fault(c, u, VEC_NM);
        }
        return;
    case GATE_X87:
        if (cr0 & (CR0_EM | CR0_TS)) {
            raise_fault(c, u, VEC_NM);
        }
        return;
    case GATE_SSE:
        if (!(cr4 & CR4_OSFXSR)) {
            raise_fault(c, u, VEC_UD);
        }
        /* fall through */
    case GATE_MMX:
        if (cr0 & CR0_EM) {
            raise_fault(c, u, VEC_UD);
        }
        if (cr0 & CR0_TS) {
            raise_fault(c, u, VEC_NM);
        }
        return;
    }
}

/* A stub's gate did not open */
void host_gate(struct cpu *c, const struct uop *u)
{
    fpu_gate(c, u, host_rows[u->aux].gate);
    __builtin_unreachable();
}

/* CR0.NE = 0 is treated as 1: docs/quirks.md */
void raise_mf(struct cpu *c, const struct uop *u) { raise_fault(c, u, VEC_MF); }

void fpu_wait(struct cpu *c, const struct uop *u)
{
    if (fpu_pending()) {
        raise_mf(c, u);
    }
}
