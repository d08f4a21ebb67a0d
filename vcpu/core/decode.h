/* The opcode table as optable.py generates it, and the decoder's interface. */
#ifndef ATOLL_DECODE_H
#define ATOLL_DECODE_H

#include "cpu.h"

enum imm_kind { IMM_NONE, IMM_B, IMM_BS, IMM_W, IMM_Z, IMM_V, IMM_JB, IMM_JZ, IMM_O, IMM_AP };
enum op_prefix { OPP_ANY, OPP_NP, OPP_66, OPP_F3, OPP_F2 };
enum op_mod { OPM_ANY, OPM_MEM, OPM_REG };
enum op_form { OPFORM_R, OPFORM_M, OPFORM_F, OPFORM_L, OPFORM_NF };

#define OPF_MODRM 0x1
#define OPF_LOCK 0x2
#define OPF_REP 0x4
#define OPF_REPZ 0x8
#define OPF_I64 0x10
#define OPF_O64 0x20
#define OPF_D64 0x40
#define OPF_F64 0x80
#define OPF_CPL0 0x100
#define OPF_END 0x200
#define OPF_JUMP 0x400
#define OPF_HOST 0x800
#define OPF_REG_BYTE 0x1000  /* ModRM.reg names a byte register */
#define OPF_RM_BYTE 0x2000   /* likewise ModRM.rm or the register in the opcode */
#define OPF_RM_OPCODE 0x4000 /* register in the opcode */
#define OPF_BYTE 0x8000      /* byte operation */
#define OPF_MOD3 0x10000 /* ModRM.mod is ignored: MOV from and to CR and DR */
#define OPF_PURE 0x200000    /* cannot fault with register operands (LEA: at all), and only changes registers and flags */
#define OPF_MAYBE 0x400000   /* writes flags only when its count is not 0 */
#define OPF_UNALIGNED 0x20000 /* the words of sse.tab and x87.tab */
#define OPF_X87 0x40000
#define OPF_NOWAIT 0x80000
#define OPF_CONTROL 0x100000

struct oprow {
    uint16_t handlers;           /* index of ophandlers */
    uint16_t aux;
    uint32_t bits;               /* OPF_* */
    uint16_t flags_written;      /* or left undefined */
    uint16_t flags_read;
    uint8_t prefix, ext, mod, rm, w; /* 0xff (w: 2) = any */
    uint8_t imm, imm2;           /* enum imm_kind */
};
struct opindex { uint16_t first, count; };

extern const uop_fn ophandlers[][5][4]; /* [form][log2 of operand bytes]; 0: no such encoding */
extern const struct oprow oprows[];
extern const struct opindex opindex[4][256];

struct decoded {
    const struct oprow *row;     /* NULL: invalid, #UD */
    uop_fn nf;                   /* the handler for when the flags are dead, or NULL */
};

/* Decodes the instruction at bytes, of which avail (at most 15) are there; rip is its own, ioff its place in the block. Fills u.
 * Returns its length, or 0: more bytes are needed than avail (with avail 15: too long, #GP). */
unsigned decode(const uint8_t *bytes, unsigned avail, uint64_t rip, unsigned ioff, unsigned mode, struct uop *u, struct decoded *d);

#endif
