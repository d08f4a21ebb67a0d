/*
 * Machine code of a host stub. A stub is a handler like any other: rdi = c, rsi = u, both intact
 * until it jumps to the next one; it uses rax rcx rdx r8 r9 and xmm0-2. Where the stub traps
 * (SIGFPE), rdi and rsi are right and the stack is as at entry.
 *
 *     gate        CR0.EM, CR0.TS, CR4.OSFXSR, once a block
 *     operand     r8 = host address: inline for 64-bit addresses that hit the TLB, else host_miss(), host_operand()
 *     load        registers the instruction reads
 *     the instruction, with xmm0/xmm1, ecx/edx and [r8] for the guest's operands
 *     commit      registers and flags it writes; x87 pointers; code-page test behind a store
 *     next        rsi += sizeof(struct uop), jump to u->fn
 */
#include "decode.h"
#include "host.h"
#include "system.h"

enum { AX, CX, DX, BX, SP, BP, SI, DI, X8, X9 };

struct code {
    uint8_t *at;
    const struct stub_form *f;
};

static void byte(struct code *e, unsigned value) { *e->at++ = (uint8_t)value; }

static void word32(struct code *e, uint32_t value)
{
    memcpy(e->at, &value, 4);
    e->at += 4;
}

/* Prefixes and opcode bytes, up to ModRM */
static void opcode(struct code *e, unsigned prefix, unsigned map, unsigned op, bool w, unsigned reg, unsigned base)
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

static void modrm_reg(struct code *e, unsigned reg, unsigned rm) { byte(e, 0xc0 | (reg & 7) << 3 | (rm & 7)); }

/* [base + disp]; base is none of rsp rbp r12 r13 */
static void modrm_mem(struct code *e, unsigned reg, unsigned base, int32_t disp)
{
    bool small = disp >= -128 && disp <= 127;
    byte(e, (disp == 0 ? 0 : small ? 0x40 : 0x80) | (reg & 7) << 3 | (base & 7));
    if (disp != 0 && small) {
        byte(e, (uint8_t)disp);
    } else if (disp != 0) {
        word32(e, (uint32_t)disp);
    }
}

static void ins_reg(struct code *e, unsigned op, bool w, unsigned reg, unsigned rm)
{
    opcode(e, 0, 0, op, w, reg, rm);
    modrm_reg(e, reg, rm);
}

static void ins_mem(struct code *e, unsigned op, bool w, unsigned reg, unsigned base, size_t disp)
{
    opcode(e, 0, 0, op, w, reg, base);
    modrm_mem(e, reg, base, (int32_t)disp);
}

/* and reg, imm32 */
static void and_imm(struct code *e, unsigned reg, bool w, int32_t value)
{
    ins_reg(e, 0x81, w, 4, reg);
    word32(e, (uint32_t)value);
}

static uint8_t *jump(struct code *e, unsigned condition)
{
    byte(e, 0x0f);
    byte(e, 0x80 | condition);
    word32(e, 0);
    return e->at;
}
#define IF_E 4
#define IF_NE 5

static void land(struct code *e, uint8_t *from)
{
    uint32_t distance = (uint32_t)(e->at - from);
    if (from) {
        memcpy(from - 4, &distance, 4);
    }
}

static void jump_back(struct code *e, const uint8_t *to)
{
    byte(e, 0xe9);
    word32(e, (uint32_t)(to - (e->at + 4)));
}

static void load_address(struct code *e, uintptr_t address)
{
    byte(e, 0x48);
    byte(e, 0xb8); /* mov rax, imm64 */
    memcpy(e->at, &address, 8);
    e->at += 8;
}

/* Calls f(rdi, rsi, rdx, rcx) and keeps rdi, rsi and r9; three pushes align the stack. Result in rax. */
static void call(struct code *e, uintptr_t f)
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

static void mov_imm(struct code *e, unsigned reg, uint32_t value)
{
    byte(e, 0xb8 | reg);
    word32(e, value);
}

static void next(struct code *e)
{
    ins_reg(e, 0x83, true, 0, SI);
    byte(e, sizeof(struct uop));
    ins_mem(e, 0xff, false, 4, SI, offsetof(struct uop, fn));
}
_Static_assert(sizeof(struct uop) < 128 && offsetof(struct uop, fn) == 0, "next() has a byte for it");

#define ARCH_OFF(member) offsetof(struct cpu, s.arch.member)
#define GPR_OFF(i) (ARCH_OFF(gpr) + 8u * (i))
#define VEC_OFF(i) (ARCH_OFF(vec) + sizeof(union vec_reg) * (i))
#define FPU_OFF(member) ARCH_OFF(fpu.member)
_Static_assert(ARCH_OFF(vec) % 16 == 0, "stubs use aligned moves");

static void load_xmm(struct code *e, unsigned xmm, unsigned guest)
{
    opcode(e, 0, 1, 0x28, false, xmm, DI); /* movaps */
    modrm_mem(e, xmm, DI, (int32_t)VEC_OFF(guest));
}

static void store_xmm(struct code *e, unsigned xmm, unsigned guest)
{
    opcode(e, 0, 1, 0x29, false, xmm, DI);
    modrm_mem(e, xmm, DI, (int32_t)VEC_OFF(guest));
}

static void load_gpr(struct code *e, unsigned reg, unsigned guest) { ins_mem(e, 0x8b, true, reg, DI, GPR_OFF(guest)); }
static void store_gpr(struct code *e, unsigned reg, unsigned guest) { ins_mem(e, 0x89, true, reg, DI, GPR_OFF(guest)); }

static bool memory_form(const struct stub_form *f) { return f->row->size && uop_mem(&f->u); }
static bool wide(const struct stub_form *f) { return f->row->bits & HOSTF_WIDE && f->u.mode & UOP_OSZ64; }
static unsigned operand_size(const struct stub_form *f) { return f->row->bits & HOSTF_Y && wide(f) ? 8 : f->row->size; }

static uint32_t descriptor(const struct stub_form *f)
{
    const struct host_row *row = f->row;
    return operand_size(f) | (row->rm_access & HOST_W ? MEM_WRITE : 0) | (row->bits & HOSTF_X87 ? MEM_WAITS : 0)
        | (row->size == 16 && !(row->bits & HOSTF_UNALIGNED) ? MEM_ALIGNED : 0);
}

static void test_byte(struct code *e, size_t offset, unsigned mask)
{
    ins_mem(e, 0xf6, false, 0, DI, offset);
    byte(e, mask);
}

/* Jumps to host_gate() go over the stub's end: failed[] collects them. */
static void gate(struct code *e, uint8_t *failed[2])
{
    switch ((enum fpu_gate)e->f->row->gate) {
    case GATE_NONE:
        break;
    case GATE_WAIT:
        ins_mem(e, 0x8b, false, AX, DI, ARCH_OFF(cr0));
        and_imm(e, AX, false, CR0_MP | CR0_TS);
        ins_reg(e, 0x83, false, 7, AX);
        byte(e, CR0_MP | CR0_TS);
        failed[0] = jump(e, IF_E);
        break;
    case GATE_SSE:
        test_byte(e, ARCH_OFF(cr4) + 1, CR4_OSFXSR >> 8);
        failed[1] = jump(e, IF_E);
        /* fall through */
    case GATE_MMX:
    case GATE_X87:
        test_byte(e, ARCH_OFF(cr0), CR0_EM | CR0_TS);
        failed[0] = jump(e, IF_NE);
        break;
    }
}

/* r8 = linear address, r9 = offset in the segment (for FDP) */
static void effective_address(struct code *e)
{
    const struct uop *u = &e->f->u;
    ins_mem(e, 0x63, true, X8, SI, offsetof(struct uop, disp)); /* movsxd */
    if (u->base != R_ZERO) {
        ins_mem(e, 0x03, true, X8, DI, GPR_OFF(u->base));
    }
    if (u->index != R_ZERO) {
        load_gpr(e, AX, u->index);
        byte(e, 0x4d); /* lea r8, [r8 + rax << scale] */
        byte(e, 0x8d);
        byte(e, 0x04);
        byte(e, u->scale << 6);
    }
    ins_reg(e, 0x89, true, X8, X9);
    if (u->seg == FS || u->seg == GS) {
        ins_mem(e, 0x03, true, X8, DI, ARCH_OFF(seg) + u->seg * sizeof(struct seg_reg) + offsetof(struct seg_reg, base));
    }
}

/* r8: linear to host address. Returns the jump taken on a miss; r8 is still linear there. */
static uint8_t *translate(struct code *e)
{
    uint32_t desc = descriptor(e->f);
    unsigned bytes = desc & 0xff;
    ins_reg(e, 0x89, true, X8, AX);
    ins_reg(e, 0xc1, true, 5, AX); /* shr rax, 12 - log2(sizeof(struct tlb_entry)) */
    byte(e, 7);
    and_imm(e, AX, false, (TLB_SIZE - 1) << 5);
    ins_mem(e, 0x03, true, AX, DI, offsetof(struct cpu, tlb));
    if (desc & MEM_ALIGNED) {
        ins_reg(e, 0x89, true, X8, CX);
        and_imm(e, CX, true, -SEG_PAGE | 15);
    } else {
        ins_mem(e, 0x8d, true, CX, X8, bytes - 1);
        and_imm(e, CX, true, -SEG_PAGE);
    }
    ins_mem(e, 0x3b, true, CX, AX, desc & MEM_WRITE ? offsetof(struct tlb_entry, write) : offsetof(struct tlb_entry, read));
    uint8_t *miss = jump(e, IF_NE);
    ins_mem(e, 0x03, true, X8, AX, offsetof(struct tlb_entry, addend));
    return miss;
}
_Static_assert(sizeof(struct tlb_entry) == 32, "translate() shifts by 7");

/* Status flags from the host's to the guest's */
static void commit_flags(struct code *e)
{
    byte(e, 0x9f);                                  /* lahf */
    byte(e, 0x0f), byte(e, 0x90), byte(e, 0xc1);    /* seto cl */
    byte(e, 0x0f), byte(e, 0xb6), byte(e, 0xc4);    /* movzx eax, ah */
    byte(e, 0x0f), byte(e, 0xb6), byte(e, 0xc9);    /* movzx ecx, cl */
    byte(e, 0xc1), byte(e, 0xe1), byte(e, 11);      /* shl ecx, 11 */
    ins_reg(e, 0x09, false, CX, AX);
    and_imm(e, AX, false, FLAGS_STATUS);
    ins_mem(e, 0x8b, true, CX, DI, ARCH_OFF(rflags));
    and_imm(e, CX, true, ~(int32_t)FLAGS_STATUS);
    ins_reg(e, 0x09, true, AX, CX);
    ins_mem(e, 0x89, true, CX, DI, ARCH_OFF(rflags));
    ins_mem(e, 0xc7, false, 0, DI, offsetof(struct cpu, lazy));
    word32(e, LAZY_NONE);
}

/* FIP, FDP, FOP of an x87 instruction that is not a control one. r9: offset of the memory operand */
static void note_pointers(struct code *e)
{
    if (!e->f->mode64) {
        mov_imm(e, DX, e->f->fop);
        mov_imm(e, CX, memory_form(e->f));
        call(e, (uintptr_t)host_note_pointers);
        return;
    }
    byte(e, 0x0f); /* movzx ecx, word [rsi + ioff] */
    ins_mem(e, 0xb7, false, CX, SI, offsetof(struct uop, ioff));
    ins_mem(e, 0x03, true, CX, DI, ARCH_OFF(rip)); /* of the block */
    ins_mem(e, 0x89, true, CX, DI, FPU_OFF(fip));
    mov_imm(e, AX, e->f->fop);
    byte(e, 0x66);
    ins_mem(e, 0x89, false, AX, DI, FPU_OFF(fop));
    if (memory_form(e->f)) {
        ins_mem(e, 0x89, true, X9, DI, FPU_OFF(fdp));
    }
}

/* Load, instruction, commit. Operands: xmm0 (reg) and xmm1 (rm), one further where XMM0 is implied; ecx (reg), edx (rm); [r8] */
static void body(struct code *e)
{
    const struct host_row *row = e->f->row;
    const struct uop *u = &e->f->u;
    bool memory = memory_form(e->f), implied = row->bits & (HOSTF_XMM0_R | HOSTF_XMM0_W);
    unsigned reg, rm;
    if (row->bits & HOSTF_CONDITION) {
        call(e, (uintptr_t)host_status_flags);
        byte(e, 0x88), byte(e, 0xc4); /* mov ah, al */
        byte(e, 0x9e);                /* sahf */
    }
    if (row->reg_class == HOST_XMM) {
        reg = implied ? 1 : 0;
        if (row->reg_access & HOST_R) {
            load_xmm(e, reg, u->reg);
        }
    } else if (row->reg_class == HOST_GPR) {
        reg = CX;
        if (row->reg_access & HOST_R) {
            load_gpr(e, reg, u->reg);
        }
    } else {
        reg = row->ext != 0xff ? row->ext : u->reg & 7;
    }
    if (memory) {
        rm = X8;
    } else if (row->rm_class == HOST_XMM) {
        rm = implied ? 2 : 1;
        if (row->rm_access & HOST_R) {
            load_xmm(e, rm, u->rm);
        }
    } else if (row->rm_class == HOST_GPR) {
        rm = DX;
        if (row->rm_access & HOST_R) {
            load_gpr(e, rm, u->rm);
        }
    } else {
        rm = row->rm != 0xff ? row->rm : u->rm & 7;
    }
    if (row->bits & HOSTF_XMM0_R) {
        load_xmm(e, 0, 0);
    }
    if (row->bits & HOSTF_EAX_EDX) {
        load_gpr(e, AX, RAX);
        load_gpr(e, DX, RDX);
    }
    opcode(e, row->prefix, row->map, row->opcode, wide(e->f), row->bits & HOSTF_MODRM ? reg : 0, row->bits & HOSTF_MODRM ? rm : 0);
    if (row->bits & HOSTF_MODRM) {
        if (memory) {
            modrm_mem(e, reg, rm, 0);
        } else {
            modrm_reg(e, reg, rm);
        }
    }
    if (row->bits & HOSTF_IMM) {
        byte(e, (uint8_t)u->imm);
    }
    if (row->reg_access & HOST_W && row->reg_class == HOST_XMM) {
        store_xmm(e, reg, u->reg);
    } else if (row->reg_access & HOST_W && row->reg_class == HOST_GPR) {
        store_gpr(e, reg, u->reg);
    }
    if (!memory && row->rm_access & HOST_W && row->rm_class == HOST_XMM) {
        store_xmm(e, rm, u->rm);
    } else if (!memory && row->rm_access & HOST_W && row->rm_class == HOST_GPR) {
        store_gpr(e, rm, u->rm);
    }
    if (row->bits & HOSTF_XMM0_W) {
        store_xmm(e, 0, 0);
    }
    if (row->bits & HOSTF_ECX_W) {
        store_gpr(e, CX, RCX);
    }
    if (row->bits & HOSTF_AX_W) {
        byte(e, 0x66);
        ins_mem(e, 0x89, false, AX, DI, GPR_OFF(RAX));
    }
    if (row->bits & HOSTF_FLAGS) {
        commit_flags(e);
    }
}

/* mov rdx, r8; mov ecx, descriptor; call */
static void call_memory(struct code *e, uintptr_t f)
{
    ins_reg(e, 0x89, true, X8, DX);
    mov_imm(e, CX, descriptor(e->f));
    call(e, f);
}

/* The operand through C: host_operand() works the address out, host_miss() has it in r8. Result in r8 */
static void slow_operand(struct code *e, bool have_address)
{
    if (have_address) {
        call_memory(e, (uintptr_t)host_miss);
    } else {
        mov_imm(e, DX, descriptor(e->f));
        call(e, (uintptr_t)host_operand);
    }
    ins_reg(e, 0x89, true, AX, X8);
}

static void slow_store(struct code *e)
{
    body(e); /* calls nothing in rows that store: r8 is still the operand */
    call_memory(e, (uintptr_t)host_stored);
}

static void finish(struct code *e)
{
    if (e->f->row->bits & HOSTF_POINTERS) {
        note_pointers(e);
    }
    next(e);
}

static void memory_stub(struct code *e)
{
    const struct stub_form *f = e->f;
    bool store = descriptor(f) & MEM_WRITE;
    if (!f->mode64 || f->u.mode & (UOP_ASZ16 | UOP_ASZ32)) {
        slow_operand(e, false);
        if (store) {
            slow_store(e);
        } else {
            body(e);
        }
        finish(e);
        return;
    }
    effective_address(e);
    uint8_t *miss = translate(e), *code_page = NULL;
    const uint8_t *hit = e->at;
    body(e);
    if (store) { /* as code_check() */
        ins_reg(e, 0x89, true, X8, AX);
        ins_mem(e, 0x2b, true, AX, DI, offsetof(struct cpu, guest));
        ins_reg(e, 0xc1, true, 5, AX);
        byte(e, 12);
        ins_mem(e, 0x8b, true, CX, DI, offsetof(struct cpu, code_mask));
        byte(e, 0x48), byte(e, 0x83), byte(e, 0x3c), byte(e, 0xc1), byte(e, 0); /* cmp qword [rcx + rax * 8], 0 */
        code_page = jump(e, IF_NE);
    }
    const uint8_t *done = e->at;
    finish(e);
    land(e, miss);
    slow_operand(e, true);
    if (!store) {
        jump_back(e, hit);
        return;
    }
    slow_store(e);
    jump_back(e, done);
    land(e, code_page);
    call_memory(e, (uintptr_t)host_code_written);
    jump_back(e, done);
}

unsigned emit_stub(const struct stub_form *f, uint8_t *to)
{
    struct code code = {to, f}, *e = &code;
    uint8_t *failed[2] = {NULL, NULL};
    if (!f->gated) {
        gate(e, failed);
    }
    if (memory_form(f)) {
        memory_stub(e);
    } else {
        body(e);
        finish(e);
    }
    if (failed[0] || failed[1]) {
        land(e, failed[0]);
        land(e, failed[1]);
        load_address(e, (uintptr_t)host_gate);
        byte(e, 0xff), byte(e, 0xe0); /* jmp rax */
    }
    return (unsigned)(e->at - to);
}
