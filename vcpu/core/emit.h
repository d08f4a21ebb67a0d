/* A stub under construction, and the encoding of the instructions it is made of: SDM vol. 2 chapter 2. */
#ifndef ATOLL_EMIT_H
#define ATOLL_EMIT_H

#include "host.h"

enum { AX, CX, DX, BX, SP, BP, SI, DI, X8, X9 };

struct rare {                    /* a path taken seldom */
    uint8_t *from;               /* behind the jump to it */
    const uint8_t *back;         /* NULL: goes on by dispatch */
    const struct stub_form *f;
    uint32_t held;
    enum { RARE_LOAD, RARE_STORE, RARE_CODE } kind;
};

struct code {
    uint8_t *at;
    const struct stub_form *f;   /* the instruction in hand */
    bool mode64, flat;
    uint32_t held;               /* bit i: the host's xmm i holds the guest's (memory always does) */
    unsigned passed;             /* gate */
    unsigned rares, failed_gates;
    struct rare rare[2 * RUN_MAX];
    uint8_t *failed_gate[2 * RUN_MAX];
};

static inline void byte(struct code *e, unsigned value) { *e->at++ = (uint8_t)value; }

static inline void word32(struct code *e, uint32_t value)
{
    memcpy(e->at, &value, 4);
    e->at += 4;
}

/* Prefixes and opcode bytes, up to ModRM */
static inline void opcode(struct code *e, unsigned prefix, unsigned map, unsigned op, bool w, unsigned reg, unsigned base)
{
    unsigned rex = (w ? 8u : 0) | (reg > 7 ? 4u : 0) | (base > 7 ? 1u : 0);
    if (prefix) {
        byte(e, prefix);
    }
    if (rex) {
        byte(e, 0x40 | rex);
    }
    if (map) {
        byte(e, 0x0f);
    }
    if (map > 1) {
        byte(e, map == 2 ? 0x38 : 0x3a);
    }
    byte(e, op);
}

static inline void modrm_reg(struct code *e, unsigned reg, unsigned rm) { byte(e, 0xc0 | (reg & 7) << 3 | (rm & 7)); }

/* [base + disp]; base is none of rsp rbp r12 r13 */
static inline void modrm_mem(struct code *e, unsigned reg, unsigned base, int32_t disp)
{
    bool small = disp >= -128 && disp <= 127;
    byte(e, (disp == 0 ? 0 : small ? 0x40 : 0x80) | (reg & 7) << 3 | (base & 7));
    if (disp != 0 && small) {
        byte(e, (uint8_t)disp);
    } else if (disp != 0) {
        word32(e, (uint32_t)disp);
    }
}

static inline void ins_reg(struct code *e, unsigned op, bool w, unsigned reg, unsigned rm)
{
    opcode(e, 0, 0, op, w, reg, rm);
    modrm_reg(e, reg, rm);
}

static inline void ins_mem(struct code *e, unsigned op, bool w, unsigned reg, unsigned base, size_t disp)
{
    opcode(e, 0, 0, op, w, reg, base);
    modrm_mem(e, reg, base, (int32_t)disp);
}

/* and reg, imm32 */
static inline void and_imm(struct code *e, unsigned reg, bool w, int32_t value)
{
    ins_reg(e, 0x81, w, 4, reg);
    word32(e, (uint32_t)value);
}

static inline uint8_t *jump(struct code *e, unsigned condition)
{
    byte(e, 0x0f);
    byte(e, 0x80 | condition);
    word32(e, 0);
    return e->at;
}
#define IF_E 4
#define IF_NE 5

static inline void land(struct code *e, uint8_t *from)
{
    uint32_t distance = (uint32_t)(e->at - from);
    memcpy(from - 4, &distance, 4);
}

static inline void jump_back(struct code *e, const uint8_t *to)
{
    byte(e, 0xe9);
    word32(e, (uint32_t)(to - (e->at + 4)));
}

static inline void load_address(struct code *e, uintptr_t address)
{
    byte(e, 0x48);
    byte(e, 0xb8); /* mov rax, imm64 */
    memcpy(e->at, &address, 8);
    e->at += 8;
}

/* Calls f(rdi, rsi, rdx, rcx) and keeps rdi, rsi and r9; three pushes align the stack. Result in rax; XMM registers are lost. */
static inline void call(struct code *e, uintptr_t f)
{
    byte(e, 0x57);
    byte(e, 0x56);
    byte(e, 0x41);
    byte(e, 0x51);
    load_address(e, f);
    byte(e, 0xff);
    byte(e, 0xd0);
    byte(e, 0x41);
    byte(e, 0x59);
    byte(e, 0x5e);
    byte(e, 0x5f);
}

static inline void mov_imm(struct code *e, unsigned reg, uint32_t value)
{
    byte(e, 0xb8 | reg);
    word32(e, value);
}

#endif
