/*
 * Machine code of a host stub: one or more instructions that follow one another. A stub is a handler like any
 * other: rdi = c, rsi = u; rsi goes along, so that it is right wherever an instruction may fault or calls C.
 * Where the stub traps (SIGFPE) the stack is as at entry. rax rcx rdx r8 r9 are scratch. Each instruction:
 *
 *     gate        CR0.EM, CR0.TS, CR4.OSFXSR; once a block
 *     operand     r8 = host address: inline for addresses without segment checks that hit the TLB, else host_miss(),
 *                 host_operand()
 *     load        registers it reads: XMM registers, unless the stub holds them; ecx/edx for general ones
 *     the instruction, with the guest's own XMM, MMX and x87 registers
 *     commit      what it wrote, to struct cpu; x87 pointers; code-page test behind a store
 *     step        rsi += sizeof(struct uop)
 *
 * and in the end a jump to u->fn. A store that hit code or took the slow path goes on by that jump too: the
 * instructions behind it may have been dropped. The rare paths stand behind the code.
 */
#include "decode.h"
#include "emit.h"
#include "system.h"

static void step(struct code *e)
{
    ins_reg(e, 0x83, true, 0, SI);
    byte(e, sizeof(struct uop));
}

static void dispatch(struct code *e) { ins_mem(e, 0xff, false, 4, SI, offsetof(struct uop, fn)); }
_Static_assert(sizeof(struct uop) < 128 && offsetof(struct uop, fn) == 0, "step() has a byte for it");

#define ARCH_OFF(member) offsetof(struct cpu, s.arch.member)
#define GPR_OFF(i) (ARCH_OFF(gpr) + 8u * (i))
#define VEC_OFF(i) (ARCH_OFF(vec) + sizeof(union vec_reg) * (i))
#define FPU_OFF(member) ARCH_OFF(fpu.member)
_Static_assert(ARCH_OFF(vec) % 16 == 0, "stubs use aligned moves");

static void move_xmm(struct code *e, unsigned op, unsigned xmm)
{
    opcode(e, 0, 1, op, false, xmm, DI); /* movaps */
    modrm_mem(e, xmm, DI, (int32_t)VEC_OFF(xmm));
    e->held |= 1u << xmm;
}

static void need_xmm(struct code *e, unsigned xmm)
{
    if (!(e->held >> xmm & 1)) {
        move_xmm(e, 0x28, xmm);
    }
}

static void store_xmm(struct code *e, unsigned xmm) { move_xmm(e, 0x29, xmm); }

/* After a call */
static void reload(struct code *e, uint32_t held)
{
    e->held = 0;
    for (unsigned i = 0; i < 16; i++) {
        if (held >> i & 1) {
            need_xmm(e, i);
        }
    }
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

static void fails(struct code *e, unsigned condition) { e->failed_gate[e->failed_gates++] = jump(e, condition); }

static void gate(struct code *e)
{
    unsigned wanted = e->f->row->gate;
    if (wanted == GATE_WAIT && e->passed < GATE_MMX) {
        ins_mem(e, 0x8b, false, AX, DI, ARCH_OFF(cr0));
        and_imm(e, AX, false, CR0_MP | CR0_TS);
        ins_reg(e, 0x83, false, 7, AX);
        byte(e, CR0_MP | CR0_TS);
        fails(e, IF_E);
    }
    if (wanted == GATE_WAIT || wanted <= e->passed) {
        return;
    }
    if (wanted == GATE_SSE) {
        test_byte(e, ARCH_OFF(cr4) + 1, CR4_OSFXSR >> 8);
        fails(e, IF_E);
    }
    if (e->passed < GATE_MMX) {
        test_byte(e, ARCH_OFF(cr0), CR0_EM | CR0_TS);
        fails(e, IF_NE);
    }
    e->passed = wanted;
}

/* r8 = linear address, r9 = offset in the segment (for FDP) */
static void effective_address(struct code *e)
{
    const struct uop *u = &e->f->u;
    if (u->base == R_ZERO) {
        byte(e, 0x49), byte(e, 0xc7), byte(e, 0xc0); /* mov r8, imm32 */
        word32(e, (uint32_t)u->disp);
    } else {
        load_gpr(e, X8, u->base);
    }
    if (u->index != R_ZERO) {
        load_gpr(e, AX, u->index);
        byte(e, 0x4d), byte(e, 0x8d), byte(e, 0x04), byte(e, u->scale << 6); /* lea r8, [r8 + rax << scale] */
    }
    if (u->base != R_ZERO && u->disp) {
        ins_reg(e, 0x81, true, 0, X8);
        word32(e, (uint32_t)u->disp);
    }
    if (e->f->row->bits & HOSTF_POINTERS) {
        ins_reg(e, 0x89, true, X8, X9);
    }
    if (!e->mode64) {
        ins_reg(e, 0x89, false, X8, X8); /* 32 bits */
    } else if (u->seg == FS || u->seg == GS) {
        ins_mem(e, 0x03, true, X8, DI, ARCH_OFF(seg) + u->seg * sizeof(struct seg_reg) + offsetof(struct seg_reg, base));
    }
}

static void rare(struct code *e, uint8_t *from, const uint8_t *back, unsigned kind)
{
    e->rare[e->rares++] = (struct rare){from, back, e->f, e->held, kind};
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
    ins_mem(e, 0xc7, false, 0, DI, offsetof(struct cpu, s.lazy));
    word32(e, LAZY_NONE);
}

/* FIP, FDP, FOP of an x87 instruction that is not a control one. r9: offset of the memory operand */
static void note_pointers(struct code *e)
{
    if (!(e->f->row->bits & HOSTF_POINTERS)) {
        return;
    }
    if (!e->mode64) {
        mov_imm(e, DX, e->f->fop);
        mov_imm(e, CX, memory_form(e->f));
        call(e, (uintptr_t)host_note_pointers);
        e->held = 0;
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

/* ModRM.reg and ModRM.rm as the host's instruction has them; loads what it reads. */
static void load_operands(struct code *e, unsigned *reg, unsigned *rm)
{
    const struct host_row *row = e->f->row;
    const struct uop *u = &e->f->u;
    *reg = row->ext != 0xff ? row->ext : row->reg_class == HOST_GPR ? CX : row->reg_class == HOST_XMM ? u->reg : u->reg & 7;
    *rm = memory_form(e->f) ? X8 : row->rm != 0xff ? row->rm : row->rm_class == HOST_GPR ? DX
        : row->rm_class == HOST_XMM ? u->rm : u->rm & 7;
    if (row->reg_access & HOST_R && row->reg_class == HOST_XMM) {
        need_xmm(e, u->reg);
    } else if (row->reg_access & HOST_R && row->reg_class == HOST_GPR) {
        load_gpr(e, CX, u->reg);
    }
    if (!memory_form(e->f) && row->rm_access & HOST_R && row->rm_class == HOST_XMM) {
        need_xmm(e, u->rm);
    } else if (!memory_form(e->f) && row->rm_access & HOST_R && row->rm_class == HOST_GPR) {
        load_gpr(e, DX, u->rm);
    }
    if (row->bits & HOSTF_XMM0_R) {
        need_xmm(e, 0);
    }
    if (row->bits & HOSTF_EAX_EDX) {
        load_gpr(e, AX, RAX);
        load_gpr(e, DX, RDX);
    }
}

static void commit(struct code *e)
{
    const struct host_row *row = e->f->row;
    const struct uop *u = &e->f->u;
    if (row->reg_access & HOST_W && row->reg_class == HOST_XMM) {
        store_xmm(e, u->reg);
    } else if (row->reg_access & HOST_W && row->reg_class == HOST_GPR) {
        store_gpr(e, CX, u->reg);
    }
    if (!memory_form(e->f) && row->rm_access & HOST_W && row->rm_class == HOST_XMM) {
        store_xmm(e, u->rm);
    } else if (!memory_form(e->f) && row->rm_access & HOST_W && row->rm_class == HOST_GPR) {
        store_gpr(e, DX, u->rm);
    }
    if (row->bits & HOSTF_XMM0_W) {
        store_xmm(e, 0);
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

/* Load, instruction, commit; a memory operand is at r8, which stays. */
static void body(struct code *e)
{
    const struct host_row *row = e->f->row;
    unsigned reg, rm;
    if (row->bits & HOSTF_CONDITION) {
        call(e, (uintptr_t)host_status_flags);
        e->held = 0;
        byte(e, 0x88), byte(e, 0xc4); /* mov ah, al */
        byte(e, 0x9e);                /* sahf */
    }
    load_operands(e, &reg, &rm);
    if (!(row->bits & HOSTF_MODRM)) {
        opcode(e, row->prefix, row->map, row->opcode, false, 0, 0);
    } else {
        opcode(e, row->prefix, row->map, row->opcode, wide(e->f), reg, rm);
        if (memory_form(e->f)) {
            modrm_mem(e, reg, rm, 0);
        } else {
            modrm_reg(e, reg, rm);
        }
    }
    if (row->bits & HOSTF_IMM) {
        byte(e, (uint8_t)e->f->u.imm);
    }
    commit(e);
}

/* mov rdx, r8; mov ecx, descriptor; call */
static void call_memory(struct code *e, uintptr_t f)
{
    ins_reg(e, 0x89, true, X8, DX);
    mov_imm(e, CX, descriptor(e->f));
    call(e, f);
}

/* Behind a store that may have hit code: body and pointers are done, what follows may be another instruction now. */
static void go_on(struct code *e)
{
    note_pointers(e);
    step(e);
    dispatch(e);
}

/* Segmented or shortened addresses: the operand through C. Returns whether the instruction was finished with a dispatch. */
static bool memory_any(struct code *e)
{
    mov_imm(e, DX, descriptor(e->f));
    call(e, (uintptr_t)host_operand);
    e->held = 0;
    ins_reg(e, 0x89, true, AX, X8);
    body(e);
    if (descriptor(e->f) & MEM_WRITE) {
        call_memory(e, (uintptr_t)host_stored);
        go_on(e);
        return true;
    }
    note_pointers(e);
    return false;
}

static void memory_fast(struct code *e)
{
    effective_address(e);
    uint8_t *miss = translate(e);
    bool store = descriptor(e->f) & MEM_WRITE;
    rare(e, miss, e->at, store ? RARE_STORE : RARE_LOAD);
    body(e);
    if (store) { /* as code_check() */
        ins_reg(e, 0x89, true, X8, AX);
        ins_mem(e, 0x2b, true, AX, DI, offsetof(struct cpu, guest));
        ins_reg(e, 0xc1, true, 5, AX);
        byte(e, 12);
        ins_mem(e, 0x8b, true, CX, DI, offsetof(struct cpu, code_mask));
        byte(e, 0x48), byte(e, 0x83), byte(e, 0x3c), byte(e, 0xc1), byte(e, 0); /* cmp qword [rcx + rax * 8], 0 */
        rare(e, jump(e, IF_NE), NULL, RARE_CODE);
    }
    note_pointers(e);
}

static void rare_path(struct code *e, const struct rare *r)
{
    e->f = r->f;
    land(e, r->from);
    if (r->kind == RARE_CODE) {
        call_memory(e, (uintptr_t)host_code_written);
        go_on(e);
        return;
    }
    call_memory(e, (uintptr_t)host_miss);
    ins_reg(e, 0x89, true, AX, X8);
    if (r->kind == RARE_LOAD) {
        reload(e, r->held);
        jump_back(e, r->back);
        return;
    }
    e->held = 0;
    body(e);
    call_memory(e, (uintptr_t)host_stored);
    go_on(e);
}

/* Is the linear address base + index << scale + disp, cut to 32 bits outside 64-bit mode? */
static bool simple_address(const struct code *e)
{
    const struct uop *u = &e->f->u;
    unsigned size = u->mode & (UOP_ASZ16 | UOP_ASZ32);
    return e->mode64 ? size == 0 : e->flat && size == UOP_ASZ32 && (u->seg == DS || u->seg == SS || u->seg == ES);
}

unsigned emit_stub(const struct stub_run *run, uint8_t *to)
{
    struct code code = {.at = to, .mode64 = run->mode64, .flat = run->flat, .passed = run->passed}, *e = &code;
    bool dispatched = false;
    for (unsigned i = 0; i < run->count; i++) {
        e->f = &run->form[i];
        gate(e);
        dispatched = false;
        if (!memory_form(e->f)) {
            body(e);
            note_pointers(e);
        } else if (simple_address(e)) {
            memory_fast(e);
        } else if ((dispatched = memory_any(e))) {
            break;
        }
        step(e);
    }
    if (!dispatched) {
        dispatch(e);
    }
    for (unsigned i = 0; i < e->rares; i++) {
        rare_path(e, &e->rare[i]);
    }
    for (unsigned i = 0; i < e->failed_gates; i++) {
        land(e, e->failed_gate[i]);
    }
    if (e->failed_gates) {
        load_address(e, (uintptr_t)host_gate);
        byte(e, 0xff), byte(e, 0xe0); /* jmp rax */
    }
    return (unsigned)(e->at - to);
}
