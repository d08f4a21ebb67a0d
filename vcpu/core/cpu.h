/*
 * The vCPU as its own process sees it: the shared block (segment.h) and, behind it in one run of
 * addresses, what is private to the process - TLB, lazy flags, block cache. One base pointer serves
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

#include "segment.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define COLD __attribute__((cold, noinline))

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, R_ZERO };
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
struct block;
typedef void (*uop_fn)(struct cpu *c, const struct uop *u);

/*
 * One decoded instruction. Handlers are threaded: each ends with NEXT(c, u), a tail call into the
 * following one, so a handler must not take the address of a local (the tail call would be lost);
 * put such work into a function of its own.
 */
struct uop {
    uop_fn fn;
    uint8_t reg;     /* ModRM.reg with REX.R; byte registers: see REG8 */
    uint8_t rm;      /* ModRM.rm with REX.B when mod = 3 */
    uint8_t base, index; /* RAX..R15 or R_ZERO */
    uint8_t scale;   /* shift count 0-3 */
    uint8_t seg;     /* segment of the memory operand, override applied */
    uint8_t mode;    /* UOP_* */
    uint8_t len;     /* of the instruction in bytes */
    int32_t disp;
    uint16_t ioff;   /* from the block's first byte */
    uint16_t aux;    /* handler's own: condition, extension, host stub index */
    uint64_t imm;    /* immediate, branch target, or pointer a handler wants */
};
#define UOP_ASZ16 0x01   /* 16-bit addresses */
#define UOP_ASZ32 0x02   /* 32-bit addresses (neither bit: 64) */
#define UOP_OSZ16 0x04
#define UOP_OSZ64 0x08   /* neither: 32 */
#define UOP_LOCK 0x10
#define UOP_REP 0x20     /* F3 */
#define UOP_REPNE 0x40   /* F2 */
#define UOP_REX 0x80     /* byte registers 4-7 are SPL BPL SIL DIL */

#define NEXT(c, u) return (u)[1].fn((c), (u) + 1)

/* ---- TLB ---- */
#define TLB_BITS 10
#define TLB_SIZE (1u << TLB_BITS)
#define TLB_INVALID UINT64_MAX
struct tlb_entry {
    uint64_t read, write, exec; /* linear page address for which a direct access is allowed, or TLB_INVALID */
    uint64_t addend;            /* host address = linear + addend */
};
/* Which of the TLBs is in force (c->tlb) follows CPL and, with CR4.SMAP, RFLAGS.AC; mmu_set_mode() picks it. */
enum { TLB_SUPER, TLB_SUPER_AC, TLB_USER, TLB_MODES };

/* ---- lazy flags: the status flags follow from result and operands of the last ALU operation ---- */
enum lazy_op { LAZY_NONE /* rflags is exact */, LAZY_ADD, LAZY_ADC, LAZY_SUB, LAZY_SBB, LAZY_LOGIC, LAZY_INC, LAZY_DEC,
               LAZY_SHL, LAZY_SHR, LAZY_SAR, LAZY_MUL, LAZY_OPS };

struct cpu {
    union {
        struct vcpu_block s;          /* shared with the other processes: c->s.arch.gpr[] and so on */
        uint8_t reserve[65536];       /* = seg_header.vcpu_stride; private memory starts page aligned */
    };
    /* -- hot -- */
    struct tlb_entry *tlb;            /* the array in force */
    struct block *block;              /* executing */
    uint64_t block_rip;               /* rip of its first byte */
    uint64_t lazy_result, lazy_a, lazy_b; /* values are kept zero-extended to 64 bits */
    uint32_t lazy_op;                 /* enum lazy_op */
    uint32_t lazy_size;               /* operand bytes 1, 2, 4, 8 */
    uint8_t *guest;                   /* host address of guest memory (seg_header.guest) */
    uint64_t *code_mask;              /* seg_header.code_mask_offset */
    uint8_t *dirty;
    uint8_t *base;                    /* host address of the segment */
    struct seg_header *seg;
    int64_t budget;                   /* instructions left in this run() */
    jmp_buf unwind;                   /* run loop: after a fault or an abandoned access */
    uint32_t index;                   /* vCPU number */
    bool single;                      /* execute one instruction at a time: TF, breakpoints, interrupt shadow */
    /* -- the fault in delivery: fault.c -- */
    uint32_t fault_vector, fault_error;
    bool fault_has_error;
    struct tlb_entry tlbs[TLB_MODES][TLB_SIZE];
    struct block_cache *blocks;       /* block.c */
    struct host_stubs *stubs;         /* stub.c: host instructions for SSE and x87 */
    void *handle;                     /* for the callback into Python */
};

#define GPR(c, i) ((c)->s.arch.gpr[i])
#define ARCH(c) (&(c)->s.arch)
_Static_assert(sizeof(struct vcpu_block) <= 65536, "vcpu_block outgrew its stride");

/* ---- faults (fault.c). These do not return: they unwind to the run loop, which delivers. The instruction that
 * called must not have changed any register or flag yet; u gives its rip. ---- */
_Noreturn void raise_fault(struct cpu *c, const struct uop *u, enum vector v);                    /* no error code */
_Noreturn void raise_fault_code(struct cpu *c, const struct uop *u, enum vector v, uint32_t error);
_Noreturn void raise_page_fault(struct cpu *c, const struct uop *u, uint64_t linear, uint32_t error); /* sets CR2 */
/* Traps and software interrupts: delivered with rip behind the instruction. */
_Noreturn void raise_trap(struct cpu *c, const struct uop *u, enum vector v);

/* ---- memory (mmu.c slow paths, mem.h inline). `lin` is a linear address. mem.h gives
 *   uint{8,16,32,64}_t mem_read{8,16,32,64}(c, u, lin);   void mem_write*(c, u, lin, value);
 *   void *mem_rmw*(c, u, lin) - pointer for host atomics, or NULL: use mem_rmw_slow
 *   void mem_read_bytes(c, u, lin, void *to, n); void mem_write_bytes(c, u, lin, const void *from, n)  (n <= 64, all or nothing)
 *   void mem_probe_write(c, u, lin, n)  (faults now if a write would)
 *   the _super variants ignore CPL (descriptor tables, TSS, IDT)
 * Every store, fast path too, tests code_mask of its page afterwards (the argument: docs/architecture.md). ---- */

/* ---- effective addresses (ea.h) ----
 *   uint64_t ea64(c, u)        64-bit addresses, flat segment: no test at all
 *   uint64_t ea_offset(c, u)   the offset, any address size (LEA)
 *   uint64_t ea_linear(c, u, size, write)  any mode: segment base, limit and type checks, canonical test, #GP/#SS
 * Non-canonical 64-bit addresses miss the TLB and fault in the slow path, #SS where seg is SS. ---- */

#endif
