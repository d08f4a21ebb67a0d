/*
 * x87 environment and state in memory: FNINIT, FNSTENV, FLDENV, FNSAVE, FRSTOR (SDM vol. 1 section 8.1.10, figures 8-9 to 8-12).
 *
 * The host's FNSTENV and FNSAVE give control, status and tag word (and mask or initialize, as the guest's do); the pointers
 * are the guest's own: arch.fpu. Memory is probed before the host's instruction, which changes state.
 */
#include "ea.h"
#include "host.h"
#include "mem.h"
#include "system.h"

struct host_env { uint32_t cw, sw, tw, fip, fcs_fop, fdp, fds; };
struct host_save { struct host_env env; uint8_t st[80]; };
_Static_assert(sizeof(struct host_save) == 108, "FNSAVE area, 32 bits");

static unsigned env_bytes(const struct uop *u) { return u->mode & UOP_OSZ16 ? 14 : 28; }

/* Address of n bytes that can be written; n bytes read. Alignment as the single words have it. */
static uint64_t writable(struct cpu *c, const struct uop *u, unsigned n)
{
    uint64_t lin = ea_linear(c, u, n, true);
    mem_probe_write(c, u, lin, n);
    host_align(c, u, lin, u->mode & UOP_OSZ16 ? 2 : 4);
    return lin;
}

static void readable(struct cpu *c, const struct uop *u, uint8_t *bytes, unsigned n)
{
    uint64_t lin = ea_linear(c, u, n, false);
    mem_read_bytes(c, u, lin, bytes, n);
    host_align(c, u, lin, u->mode & UOP_OSZ16 ? 2 : 4);
}

/* The guest's environment in its own format; returns its bytes. */
static unsigned put_env(const struct cpu *c, const struct uop *u, const struct host_env *env, uint8_t to[28])
{
    const struct x87_state *fpu = &c->s.arch.fpu;
    bool real = mode_real_or_vm86(c);
    uint32_t fip = (uint32_t)fpu->fip, fdp = (uint32_t)fpu->fdp;
    if (real) {
        fip += (uint32_t)fpu->fcs << 4;
        fdp += (uint32_t)fpu->fds << 4;
    }
    if (u->mode & UOP_OSZ16) {
        uint16_t words[7] = {(uint16_t)env->cw, (uint16_t)env->sw, (uint16_t)env->tw, (uint16_t)fip, fpu->fcs, (uint16_t)fdp, fpu->fds};
        if (real) {
            words[4] = (uint16_t)((fip >> 16 & 15) << 12 | fpu->fop);
            words[6] = (uint16_t)((fdp >> 16 & 15) << 12);
        }
        memcpy(to, words, sizeof words);
        return sizeof words;
    }
    uint32_t words[7] = {env->cw | 0xffff0000u, env->sw | 0xffff0000u, env->tw | 0xffff0000u, fip, fpu->fcs | (uint32_t)fpu->fop << 16,
                         fdp, fpu->fds | 0xffff0000u};
    if (real) {
        words[3] = (fip & 0xffff) | 0xffff0000u;
        words[4] = (fip >> 16) << 12 | fpu->fop;
        words[5] = (fdp & 0xffff) | 0xffff0000u;
        words[6] = (fdp >> 16) << 12;
    }
    memcpy(to, words, sizeof words);
    return sizeof words;
}

/* Sets the guest's pointers; *env is left for the host, without any. */
static void get_env(struct cpu *c, const struct uop *u, const uint8_t from[28], struct host_env *env)
{
    struct x87_state *fpu = &ARCH(c)->fpu;
    bool real = mode_real_or_vm86(c);
    uint32_t w[7];
    if (u->mode & UOP_OSZ16) {
        for (unsigned i = 0; i < 7; i++) {
            w[i] = from[2 * i] | (uint32_t)from[2 * i + 1] << 8;
        }
        fpu->fop = real ? w[4] & 0x7ff : 0;
    } else {
        memcpy(w, from, sizeof w);
        fpu->fop = (real ? w[4] : w[4] >> 16) & 0x7ff;
    }
    if (real) { /* linear addresses: bits from 16 on stand in bits 12 and up of the words behind */
        fpu->fip = (w[3] & 0xffff) | (w[4] >> 12) << 16;
        fpu->fdp = (w[5] & 0xffff) | (w[6] >> 12) << 16;
        fpu->fcs = fpu->fds = 0;
    } else {
        fpu->fip = w[3];
        fpu->fdp = w[5];
        fpu->fcs = (uint16_t)w[4];
        fpu->fds = (uint16_t)w[6];
    }
    memset(env, 0, sizeof *env);
    env->cw = w[0] & 0xffff;
    env->sw = w[1] & 0xffff;
    env->tw = w[2] & 0xffff;
}

static void clear_pointers(struct cpu *c)
{
    struct x87_state *fpu = &ARCH(c)->fpu;
    fpu->fip = fpu->fdp = 0;
    fpu->fop = fpu->fcs = fpu->fds = 0;
}

static COLD void fnstenv(struct cpu *c, const struct uop *u)
{
    struct host_env env;
    struct fx_image before;
    uint8_t bytes[28];
    fpu_gate(c, u, GATE_X87);
    uint64_t lin = writable(c, u, env_bytes(u));
    fpu_store_image(&before);
    __asm__ volatile("fnstenv %0" : "=m"(env));
    unsigned n = put_env(c, u, &env, bytes);
    STORE_WITH_STATE(&before, mem_write_bytes(c, u, lin, bytes, n));
}

static COLD void fldenv(struct cpu *c, const struct uop *u)
{
    struct host_env env;
    uint8_t bytes[28];
    fpu_gate(c, u, GATE_X87);
    fpu_wait(c, u);
    readable(c, u, bytes, env_bytes(u));
    get_env(c, u, bytes, &env);
    __asm__ volatile("fldenv %0" : : "m"(env));
}

static COLD void fnsave(struct cpu *c, const struct uop *u)
{
    struct host_save save;
    struct fx_image before;
    uint8_t bytes[108];
    unsigned n = env_bytes(u);
    fpu_gate(c, u, GATE_X87);
    uint64_t lin = writable(c, u, n + 80);
    fpu_store_image(&before);
    __asm__ volatile("fnsave %0" : "=m"(save));
    put_env(c, u, &save.env, bytes);
    memcpy(bytes + n, save.st, 80);
    STORE_WITH_STATE(&before, mem_write_bytes(c, u, lin, bytes, n + 80));
    clear_pointers(c);
}

static COLD void frstor(struct cpu *c, const struct uop *u)
{
    struct host_save save;
    uint8_t bytes[108];
    unsigned n = env_bytes(u);
    fpu_gate(c, u, GATE_X87);
    fpu_wait(c, u);
    readable(c, u, bytes, n + 80);
    get_env(c, u, bytes, &save.env);
    memcpy(save.st, bytes + n, 80);
    __asm__ volatile("frstor %0" : : "m"(save));
}

void op_fnstenv(struct cpu *c, const struct uop *u)
{
    fnstenv(c, u);
    NEXT(c, u);
}

void op_fldenv(struct cpu *c, const struct uop *u)
{
    fldenv(c, u);
    NEXT(c, u);
}

void op_fnsave(struct cpu *c, const struct uop *u)
{
    fnsave(c, u);
    NEXT(c, u);
}

void op_frstor(struct cpu *c, const struct uop *u)
{
    frstor(c, u);
    NEXT(c, u);
}

void op_fninit(struct cpu *c, const struct uop *u)
{
    fpu_gate(c, u, GATE_X87);
    __asm__ volatile("fninit");
    clear_pointers(c);
    NEXT(c, u);
}
