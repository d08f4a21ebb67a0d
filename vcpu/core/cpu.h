/*
 * The vCPU as its own process sees it: the shared block (segment.h) and, behind it in one run of
 * addresses, what is private to the process - TLB, block cache. One base pointer serves
 * both: core.c maps the segment's block at the front of the reservation and anonymous memory behind.
 */
#ifndef ATOLL_CPU_H
#define ATOLL_CPU_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "seg.h"
#include "system_state.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define COLD __attribute__((cold, noinline))

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, R_ZERO, R_RIP };
enum { ES, CS, SS, DS, FS, GS, SEG_NONE };

/* RFLAGS, SDM vol. 1 section 3.4.3 */
#define FLAG_CF 0x1u
#define FLAG_PF 0x4u
#define FLAG_AF 0x10u
#define FLAG_ZF 0x40u
#define FLAG_SF 0x80u
#define FLAG_TF 0x100u
#define FLAG_IF 0x200u
#define FLAG_DF 0x400u
#define FLAG_OF 0x800u
#define FLAG_IOPL 0x3000u
#define FLAG_NT 0x4000u
#define FLAG_RF 0x10000u
#define FLAG_VM 0x20000u
#define FLAG_AC 0x40000u
#define FLAG_VIF 0x80000u
#define FLAG_VIP 0x100000u
#define FLAG_ID 0x200000u
#define FLAGS_STATUS (FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF)

enum vector {
    VEC_DE = 0, VEC_DB = 1, VEC_NMI = 2, VEC_BP = 3, VEC_OF = 4, VEC_BR = 5, VEC_UD = 6, VEC_NM = 7, VEC_DF = 8,
    VEC_TS = 10, VEC_NP = 11, VEC_SS = 12, VEC_GP = 13, VEC_PF = 14, VEC_MF = 16, VEC_AC = 17, VEC_MC = 18, VEC_XM = 19
};

struct cpu;
struct uop;
typedef void (*uop_fn)(struct cpu *c, const struct uop *u);

/*
 * One decoded instruction. Handlers are threaded: each ends with NEXT(c, u), a tail call into the
 * following one, so a handler must not take the address of a local (the tail call would be lost);
 * put such work into a function of its own.
 *
 * A handler that has set arch.rip itself (far transfer, SYSCALL, task switch...) ends with a plain
 * `return`: that is the way to the run loop, which looks at the mode again and goes on at arch.rip.
 * Rows of the opcode table with the attribute `end` need not do that: the block ends behind them,
 * and NEXT() leads to the run loop with rip behind the instruction.
 */
struct uop {
    uop_fn fn;
    uint8_t reg;     /* ModRM.reg with REX.R; of a byte operand (Gb): offset in gpr[], see REG8 */
    uint8_t rm;      /* ModRM.rm with REX.B or the register in the opcode; likewise; RM_MEM: memory operand */
    uint8_t base, index; /* RAX..R15, R_ZERO or (base, in a block) R_RIP = rip of the block's first byte */
    uint8_t scale;   /* shift count 0-3 */
    uint8_t seg;     /* segment of the memory operand, override applied */
    uint8_t mode;    /* UOP_* */
    uint8_t len;     /* of the instruction in bytes */
    int32_t disp;
    uint16_t ioff;   /* from the block's first byte */
    uint16_t aux;    /* condition (+cc rows), host stub (host rows), second immediate (ENTER), else the row's aux= */
    uint64_t imm;    /* immediate, sign-extended where the operand says so; branch target (rip); moffs; far pointer offset | selector << 32 */
};
#define RM_MEM 0xff
#define UOP_ASZ16 0x01   /* 16-bit addresses */
#define UOP_ASZ32 0x02   /* 32-bit addresses (neither bit: 64) */
#define UOP_OSZ16 0x04
#define UOP_OSZ64 0x08   /* neither: 32 */
#define UOP_LOCK 0x10
#define UOP_REP 0x20     /* F3 */
#define UOP_REPNE 0x40   /* F2 */
#define UOP_REX 0x80     /* there was a REX prefix */

#define NEXT(c, u) return (u)[1].fn((c), (u) + 1)

/* Translated code from rip on; block.c owns it. */
struct block {
    uint64_t rip;                     /* of its first byte */
    uint32_t count;                   /* instructions */
    uint32_t mode;                    /* MODE_* */
    uint64_t offset;                  /* of its first byte in guest memory */
    uint64_t offset2;                 /* of the second page, where its only instruction straddles; else SEG_NO_OFFSET */
    struct block *hash_next;
    struct block *page_next;          /* blocks that begin in the same page */
    struct block *straddle_next;      /* blocks that end in the same second page */
    uint32_t limit;                   /* CS limit it was decoded with; only for segmented code */
    uint16_t bytes, uops;
    struct uop u[];
};
/* Jump cache: blocks by rip; void when its key is not the cpu's */
#define JUMP_BITS 12
struct jump_entry { struct block *block; uint64_t key; };

/* What a block depends on besides its bytes. */
#define MODE_64 0x1      /* 64-bit mode */
#define MODE_D 0x2       /* CS.D: 32-bit code */
#define MODE_FLAT 0x4    /* 64-bit mode, or CS DS ES SS with base 0 and limit 4 GiB */
#define MODE_SINGLE 0x8  /* one instruction a block */
#define MODE_USER 0x10   /* CPL 3: in the jump cache's key only */

/* ---- TLB ---- */
#define TLB_BITS 12
#define TLB_SIZE (1u << TLB_BITS)
#define TLB_INVALID UINT64_MAX
struct tlb_entry {
    uint64_t read, write, exec; /* linear page address for which a direct access is allowed, or TLB_INVALID */
    uint64_t addend;            /* host address = linear + addend */
};
/* Which of the TLBs is in force (c->tlb) follows CPL and, with CR4.SMAP, RFLAGS.AC; mmu_set_mode() picks it.
 * TLB_CHECKED is never filled: every access takes the slow path (alignment checks, data breakpoints). */
enum { TLB_SUPER, TLB_SUPER_AC, TLB_USER, TLB_CHECKED, TLB_MODES };

/* ---- lazy flags (flags.h): the status flags follow from result and operands of the last ALU operation.
 * c->s.lazy = enum lazy_op << 2 | log2(operand bytes). They are in the shared block, for who looks at it when this process
 * has died; the base pointer serves both, so that costs nothing ---- */
enum lazy_op { LAZY_NONE /* rflags is exact */, LAZY_ADD, LAZY_ADC /* carry in was 1 */, LAZY_SUB, LAZY_SBB /* borrow in was 1 */,
               LAZY_LOGIC, LAZY_INC /* INC, DEC: CF is the one in rflags */, LAZY_DEC,
               LAZY_SHL /* a = operand, b = count > 0 */, LAZY_SHR, LAZY_SAR, LAZY_MUL /* b = CF and OF */, LAZY_OPS };

struct cpu {
    union {
        struct vcpu_block s;          /* shared with the other processes: c->s.arch.gpr[] and so on */
        uint8_t reserve[65536];       /* = seg_header.vcpu_stride; private memory starts page aligned */
    };
    /* -- hot -- */
    struct tlb_entry *tlb;            /* the array in force */
    struct block *block;              /* executing */
    uint32_t mode;                    /* MODE_*, of the block in execution */
    uint64_t jump_key;                /* mode and generation: entries of the jump cache with another key are void */
    uint64_t jump_generation[2];      /* of supervisor code, and of CPL 3 */
    uint64_t jump_cs_base;            /* segmented code: the CS that the jump cache's entries belong to */
    uint32_t jump_cs_limit;
    uint8_t *guest;                   /* host address of guest memory (seg_header.guest) */
    uint64_t *code_mask;              /* seg_header.code_mask_offset */
    uint8_t *dirty;
    uint8_t *base;                    /* host address of the segment */
    struct seg_header *seg;
    int64_t budget;                   /* instructions left in this run(); block heads count down */
    int64_t budget_noted;             /* what of it is in s.instructions already */
    uint32_t pauses;                  /* PAUSE instructions */
    uint64_t run_started, halt_before; /* host ns and s.halt_ns when run() was entered */
    jmp_buf unwind;                   /* run loop: after a fault or an abandoned access */
    uint32_t index;                   /* vCPU number */
    bool single;                      /* debug registers are armed: one instruction at a time, with debug_before/after (B) */
    bool halt_exits;                  /* HLT ends run() with EXIT_DEBUG: for harnesses */
    bool world_held;                  /* this vCPU has stopped the world (D: world_stop, world_resume) */
    /* -- the fault in delivery: fault.c -- */
    uint32_t fault_vector, fault_error;
    bool fault_has_error;
    struct system_state sys;          /* mmu.c fault.c debug.c */
    struct tlb_entry tlbs[TLB_MODES][TLB_SIZE];
    struct jump_entry jump[1 << JUMP_BITS];
    struct block_cache *blocks;       /* block.c */
    struct host_stubs *stubs;         /* stub.c: host instructions for SSE and x87 */
    void *handle;                     /* for the callback into Python */
    bool intr_ready;                  /* apic.c: an interrupt waits that IF and the interrupt shadow alone can hold back */
    bool lint0_seen;                  /* apic_irq.c: level of the PIC's INTR at the last look */
    struct apic_timer *timer;         /* apic_timer.c */
    int doorbell[SEG_MAX_HOSTS];      /* eventfd of each device host, -1 = none */
};

/* The general registers, and behind them R_ZERO and R_RIP. arch.rip, while a block executes, is that of its first byte: uop_rip(). */
#define GPR(c, i) (((uint64_t *)&(c)->s.arch)[i])
_Static_assert(offsetof(struct cpu_arch, zero) == R_ZERO * 8 && offsetof(struct cpu_arch, rip) == R_RIP * 8, "registers a uop names");
#define ARCH(c) (&(c)->s.arch)
/* Byte register: u->reg and u->rm of byte operands are offsets in gpr[] (n * 8, or (n - 4) * 8 + 1 for AH CH DH BH) */
#define REG8(c, off) (((uint8_t *)(c)->s.arch.gpr)[off])
#define REG16(c, i) (*(uint16_t *)&(c)->s.arch.gpr[i])
#define REG32(c, i) (*(uint32_t *)&(c)->s.arch.gpr[i]) /* read; to write use GPR() = (uint32_t)value, which clears the upper half */
_Static_assert(sizeof(struct vcpu_block) <= 65536, "vcpu_block outgrew its stride");

static inline bool uop_mem(const struct uop *u) { return u->rm == RM_MEM; }
/* operand bytes of a v-size operand */
static inline unsigned uop_size(const struct uop *u) { return u->mode & UOP_OSZ64 ? 8 : u->mode & UOP_OSZ16 ? 2 : 4; }
/* rip of the instruction; u = NULL: of the run loop's own work (fetch, event delivery) */
static inline uint64_t uop_rip(const struct cpu *c, const struct uop *u) { return u ? c->block->rip + u->ioff : c->s.arch.rip; }
static inline uint64_t uop_next_rip(const struct cpu *c, const struct uop *u)
{
    uint64_t rip = c->block->rip + u->ioff + u->len;
    return c->mode & MODE_64 ? rip : c->mode & MODE_D ? (uint32_t)rip : (uint16_t)rip;
}

/* ---- unwinding (run.c, A): sets arch.rip to the instruction's (or behind it), puts the instruction count right, longjmps. ---- */
enum { UNWIND_FAULT = 1 /* run loop calls fault_deliver() */, UNWIND_RETRY /* the instruction starts again when run() is next called */,
       UNWIND_TRAP /* like FAULT, rip behind the instruction */ };
_Noreturn void cpu_unwind(struct cpu *c, const struct uop *u, int how);

/* ---- faults (fault.c, B). These do not return: they note the fault and cpu_unwind(). The instruction that
 * called must not have changed any register or flag yet; u gives its rip (NULL: arch.rip is right). ---- */
_Noreturn void raise_fault(struct cpu *c, const struct uop *u, enum vector v);                    /* no error code */
_Noreturn void raise_fault_code(struct cpu *c, const struct uop *u, enum vector v, uint32_t error);
_Noreturn void raise_page_fault(struct cpu *c, const struct uop *u, uint64_t linear, uint32_t error); /* sets CR2 */
/* Traps and software interrupts: delivered with rip behind the instruction. */
_Noreturn void raise_trap(struct cpu *c, const struct uop *u, enum vector v);
/* Delivers what raise_*() noted (c->fault_*), contributory faults included; may fault again. arch.rip is exact. */
void fault_deliver(struct cpu *c);
/* External interrupts, NMI: kind as B defines it in fault.h. */

/* ---- run loop's hooks (B): only called while c->single or RFLAGS.TF asks for it ---- */
void debug_before(struct cpu *c);          /* instruction breakpoints, RF; may raise_fault(c, NULL, VEC_DB) */
void debug_after(struct cpu *c, bool tf);  /* single-step and pending data or port breakpoints; raises #DB as a trap, rip is behind */

/* ---- run loop (run.c) and blocks (block.c), A ---- */
void mode_update(struct cpu *c);           /* c->mode and jump_key after a change of CS SS DS ES, EFER, CPL (the run loop does it too) */
void jump_cache_flush(struct cpu *c);      /* mmu_flush*() call this: linear addresses may lead elsewhere */
void jump_cache_flush_user(struct cpu *c); /* those of CPL 3 alone */
void blocks_drop_page(struct cpu *c, uint64_t page); /* guest memory page index; own blocks */
void blocks_drop_all(struct cpu *c);

/* mem.h: memory accesses. flags.h: flags_get(), flags_set_status(), conditions. ea.h: effective addresses, segment checks. */

#endif
