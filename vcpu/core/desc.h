/*
 * Segment descriptors and stacks as far transfers, events and segment loads use them (desc.c).
 * SDM vol. 3 sections 3.4.5, 3.5, 5.8; APM vol. 2 section 4.7.
 */
#ifndef ATOLL_DESC_H
#define ATOLL_DESC_H

#include "cpu.h"
#include "flags.h"
#include "mmu.h"
#include "system.h"

/* Attributes as in struct seg_reg: descriptor bits 40-55. */
#define ATTR_TYPE 0xfu
#define ATTR_ACCESSED 0x1u
#define ATTR_WRITABLE 0x2u   /* data; code: readable */
#define ATTR_READABLE 0x2u
#define ATTR_DOWN 0x4u       /* data: expands down; code: conforming */
#define ATTR_CONFORMING 0x4u
#define ATTR_CODE 0x8u
#define ATTR_S 0x10u
#define ATTR_P 0x80u
#define ATTR_L 0x2000u
#define ATTR_D 0x4000u
#define ATTR_G 0x8000u
#define ATTR_DPL(a) (((a) >> 5) & 3u)
#define ATTR_OF_DPL(d) ((d) << 5)

/* System descriptor types, SDM vol. 3 table 3-2 */
enum {
    DESC_TSS16 = 1, DESC_LDT = 2, DESC_TSS16_BUSY = 3, DESC_CALL16 = 4, DESC_TASK_GATE = 5, DESC_INT16 = 6, DESC_TRAP16 = 7,
    DESC_TSS32 = 9, DESC_TSS32_BUSY = 11, DESC_CALL32 = 12, DESC_INT32 = 14, DESC_TRAP32 = 15
};
#define DESC_BUSY 2u

struct desc {
    uint64_t linear;   /* where it lies */
    uint64_t base;     /* of a segment */
    uint32_t lo, hi;   /* as in memory */
    uint32_t limit;    /* granularity applied */
    uint16_t attr, selector;
};

/* Selector error code: EXT (0 or 1) is put in by the caller */
#define SEL_ERROR(sel) ((uint32_t)(sel) & 0xfffcu)
#define SEL_NULL(sel) (!((sel) & 0xfffcu))
#define SEL_RPL(sel) ((sel) & 3u)

/* Reads the descriptor of a selector; false: outside its table (or no LDT). */
bool desc_read(struct cpu *c, const struct uop *u, uint16_t selector, struct desc *d);
/* Completes a 16-byte system descriptor or call gate of long mode: upper half of the base. false: outside the table, or
 * its upper type field is not 0. */
bool desc_read_upper(struct cpu *c, const struct uop *u, struct desc *d, uint64_t *upper);
void desc_accessed(struct cpu *c, const struct uop *u, struct desc *d); /* sets the accessed bit, in memory and in d */
struct seg_reg desc_segment(const struct desc *d, uint16_t selector);

/* What real mode and VM86 load */
void seg_load_real(struct cpu *c, unsigned seg, uint16_t selector);
void seg_load_vm86(struct cpu *c, unsigned seg, uint16_t selector);
void seg_load_null(struct cpu *c, unsigned seg, uint16_t selector);
/* DS ES FS GS in protected mode, all checks at CPL cpl; commits. v: VEC_GP, or VEC_TS in a task switch; ext: EXT bit of the error code */
void seg_load_data(struct cpu *c, const struct uop *u, unsigned seg, uint16_t selector, unsigned cpl, enum vector v, uint32_t ext);
/* The checks of a new SS; v: exception for privilege and type (#GP, or #TS in a switch). Returns the segment. */
struct seg_reg seg_check_stack(struct cpu *c, const struct uop *u, uint16_t selector, unsigned cpl, enum vector v, uint32_t ext);
/* Return to an outer level: data segments that the new CPL may not use become null (SDM vol. 2, RET). */
void seg_drop_privileged(struct cpu *c, unsigned cpl);
void ldtr_load(struct cpu *c, const struct uop *u, uint16_t selector, enum vector v, uint32_t ext);
void set_cpl(struct cpu *c, unsigned cpl); /* and what hangs on it */

/* ---- a stack being pushed to or popped from; committed at the end only */
struct stack {
    const struct uop *u;
    struct seg_reg ss;
    uint64_t sp;
    unsigned mode;     /* TLB */
    unsigned width;    /* bytes an item */
    uint32_t error;    /* of the #SS when outside the limit */
    bool flat64;       /* no limit, 64-bit pointer */
};
struct stack stack_current(struct cpu *c, const struct uop *u, unsigned width);
void stack_push(struct cpu *c, struct stack *s, uint64_t value);
uint64_t stack_pop(struct cpu *c, struct stack *s);
uint64_t stack_peek(struct cpu *c, const struct stack *s, unsigned item); /* item-th above the top */
void stack_commit(struct cpu *c, const struct stack *s); /* RSP; the part that the stack's size says */

/* ---- far.c */
/* #GP(0) unless rip is inside a code segment, canonical in 64-bit mode. ext as above. */
void code_check_rip(struct cpu *c, const struct uop *u, const struct seg_reg *cs, uint64_t rip, uint32_t ext);
void code_commit(struct cpu *c, const struct seg_reg *cs, uint64_t rip, unsigned cpl);

/* ---- task.c: SDM vol. 3 section 7.3. d: the TSS descriptor, checked for type and presence. */
enum task_reason { TASK_JUMP, TASK_CALL, TASK_IRET, TASK_EVENT };
void task_switch(struct cpu *c, const struct uop *u, struct desc *d, enum task_reason reason, uint64_t next_rip,
                 bool has_error, uint32_t error, uint32_t ext);
/* Inner stack of the current TSS for protected mode: SS and ESP of level dpl; #TS when outside the TSS. */
void task_inner_stack(struct cpu *c, const struct uop *u, unsigned dpl, uint16_t *ss, uint32_t *esp, uint32_t ext);
uint64_t task_inner_stack64(struct cpu *c, const struct uop *u, unsigned item, uint32_t ext); /* item 0-2: RSPn, 4-10: ISTn-3 */

#endif
