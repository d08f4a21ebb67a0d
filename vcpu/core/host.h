/*
 * Guest x87, MMX and SSE instructions run as the host's own: stub.c makes, for such instructions as follow one
 * another in a block, a handler in machine code (emit.c) around the instructions themselves.
 *
 * While run() is inside, the host's x87/MMX registers, control word and MXCSR are the guest's, masks
 * included; the XMM registers live in arch.vec and are in the host's within a stub only. This is sound because
 * nothing else between fpu_unpark() and fpu_park() touches them: the C of this core has no floating-point
 * arithmetic and no long double, libc's string functions use none, and every way into Python parks first.
 * A guest exception that its masks let through is then a host trap (SIGFPE) at the very instruction, before it
 * committed anything; the handler turns it into the guest's #MF or #XM.
 */
#ifndef ATOLL_HOST_H
#define ATOLL_HOST_H

#include "cpu.h"
#include "fpu_state.h"

/* ---- for the run loop and whoever calls into Python ---- */
/* NULL, or a line that says what the host lacks. */
const char *host_lacks(void);
/* Memory for stubs; false: errno says why not. */
bool host_init(struct cpu *c);
void host_free(struct cpu *c);
/* Stubs of all forms are forgotten; no block may be left that holds one. */
void host_reset(struct cpu *c);
/* Memory for stubs is used up: drop all blocks, then host_reset(). Until then each use makes its stub anew. */
bool host_full(const struct cpu *c);

/* arch.fpu into the host's registers; the other way round, leaving the host with the ABI's defaults. Both nest not. */
void fpu_unpark(struct cpu *c);
void fpu_park(struct cpu *c);

/* ---- what a form is: from the opcode table ---- */
enum host_class { HOST_NONE, HOST_XMM, HOST_MMX, HOST_GPR };
#define HOST_R 1
#define HOST_W 2

struct host_row {
    uint8_t prefix;              /* 0, 66, F3, F2 */
    uint8_t map, opcode;
    uint8_t ext;                 /* ModRM.reg, or FF */
    uint8_t rm;                  /* ModRM.rm where it belongs to the opcode, or FF */
    uint8_t reg_class, reg_access; /* enum host_class, HOST_R | HOST_W */
    uint8_t rm_class, rm_access; /* of the register form; access of the memory form too */
    uint8_t size;                /* bytes of the memory operand; HOSTF_Y: 8 with REX.W */
    uint8_t gate;                /* enum fpu_gate */
    uint32_t bits;               /* HOSTF_* */
};
#define HOSTF_MODRM 0x1
#define HOSTF_IMM 0x2            /* imm8 follows */
#define HOSTF_UNALIGNED 0x4
#define HOSTF_X87 0x8            /* waits: #MF comes before faults of the memory operand */
#define HOSTF_POINTERS 0x10      /* sets FIP, FDP, FOP */
#define HOSTF_FLAGS 0x20         /* writes the status flags */
#define HOSTF_CONDITION 0x40     /* reads them */
#define HOSTF_Y 0x80             /* the memory operand has 8 bytes with REX.W */
#define HOSTF_WIDE 0x2000        /* REX.W means something */
#define HOSTF_XMM0_R 0x100       /* implied registers */
#define HOSTF_XMM0_W 0x200
#define HOSTF_EAX_EDX 0x400
#define HOSTF_ECX_W 0x800
#define HOSTF_AX_W 0x1000

/* What must hold before an instruction may run: each includes what stands before it, except GATE_WAIT. */
enum fpu_gate { GATE_NONE, GATE_WAIT /* not MP and TS */, GATE_MMX /* EM = 0 else #UD, TS = 0 else #NM */,
                GATE_X87 /* the same, both #NM */, GATE_SSE /* as MMX, and CR4.OSFXSR = 1 else #UD */ };

extern const struct host_row host_rows[]; /* uop.aux is the index */

/* ---- parts ---- */
#define RUN_MAX 24               /* instructions in a stub */
#define STUB_MAX (RUN_MAX * 512) /* bytes of a stub at most */

struct stub_slot { uint64_t key; uint32_t offset; };

struct host_stubs {
    _Alignas(64) uint8_t bounce[64]; /* operand of an access that has no single host address */
    struct fx_image before;      /* x87 state before a store into the bounce buffer */
    uint64_t store_lin;          /* where the bounce buffer goes */
    uint64_t seed;               /* of the keys */
    uint8_t *writable, *executable; /* two mappings of one memory */
    uint32_t used, count;
    struct host_stubs *next;     /* all of the process: the SIGFPE handler looks */
    struct stub_slot slot[];
};

/* emit.c: one stub for instructions that follow one another; returns the length of its code. */
struct stub_form {
    const struct host_row *row;
    struct uop u;
    uint16_t fop;
};
struct stub_run {
    unsigned count;
    bool mode64, flat;           /* MODE_64, MODE_FLAT */
    uint8_t passed;              /* enum fpu_gate that earlier instructions of the block have passed */
    struct stub_form form[RUN_MAX];
};
unsigned emit_stub(const struct stub_run *run, uint8_t *to);

/* Called by stubs. Descriptor of a memory operand: bytes | MEM_*. */
#define MEM_WRITE 0x100
#define MEM_ALIGNED 0x200
#define MEM_WAITS 0x400
void *host_miss(struct cpu *c, const struct uop *u, uint64_t lin, uint32_t desc);
void *host_operand(struct cpu *c, const struct uop *u, uint32_t desc);
void host_stored(struct cpu *c, const struct uop *u, void *to, uint32_t desc);
void host_code_written(struct cpu *c, const struct uop *u, void *to, uint32_t desc);
void host_note_pointers(struct cpu *c, const struct uop *u, uint32_t fop, uint32_t memory);
uint32_t host_status_flags(struct cpu *c);
_Noreturn void host_gate(struct cpu *c, const struct uop *u);

/* ---- for handlers in C ---- */
void fpu_gate(struct cpu *c, const struct uop *u, enum fpu_gate gate);
/* #AC where alignment is checked; after the page faults of the operand */
void host_align(struct cpu *c, const struct uop *u, uint64_t lin, unsigned align);
_Noreturn void raise_mf(struct cpu *c, const struct uop *u);
/* Is an unmasked x87 exception pending (status word, ES)? The guest's state is in the host's registers. */
static inline bool fpu_pending(void)
{
    uint16_t sw;
    __asm__ volatile("fnstsw %0" : "=a"(sw));
    return sw & 0x80;
}
/* #MF if so */
void fpu_wait(struct cpu *c, const struct uop *u);

#endif
