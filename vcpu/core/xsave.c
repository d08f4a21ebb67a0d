/*
 * FXSAVE and XSAVE areas: SDM vol. 1 section 10.5, chapter 13; vol. 2 FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XRSTOR.
 *
 * State components are x87 (bit 0 of XCR0) and SSE (bit 1); only the standard form exists. FIP, FDP and FOP are always
 * saved and restored, as Intel's CPUs do (AMD's only while an exception is pending).
 */
#include "ea.h"
#include "fpu_state.h"
#include "host.h"
#include "mem.h"
#include "system.h"

#define STATE_X87 1u
#define STATE_SSE 2u
#define STATE_AVX 4u             /* not in XCR0 here; MXCSR goes with it too */
#define AREA 576                 /* legacy region and header */

struct xsave_area {
    struct fx_image legacy;
    uint64_t xstate_bv, xcomp_bv, reserved[6];
};
_Static_assert(sizeof(struct xsave_area) == AREA, "XSAVE area");

static unsigned xmm_count(const struct cpu *c) { return c->mode & MODE_64 ? 16 : 8; }

/* Linear address of the area: alignment is checked whatever CR0.AM says */
static uint64_t area(struct cpu *c, const struct uop *u, unsigned n, unsigned align, bool write)
{
    uint64_t lin = ea_linear(c, u, n, write);
    if (lin & (align - 1)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    return lin;
}

static void put_x87(const struct cpu *c, const struct uop *u, struct fx_image *image)
{
    const struct x87_state *fpu = &c->s.arch.fpu;
    struct fx_image host;
    fpu_store_image(&host);
    memcpy(image, &host, 6);
    image->fop = fpu->fop;
    if (u->mode & UOP_OSZ64) {
        image->fip = fpu->fip;
        image->fdp = fpu->fdp;
    } else {
        image->fip = (uint32_t)fpu->fip | (uint64_t)fpu->fcs << 32;
        image->fdp = (uint32_t)fpu->fdp | (uint64_t)fpu->fds << 32;
    }
    memcpy(image->st, host.st, sizeof host.st);
}

static void get_x87(struct cpu *c, const struct uop *u, const struct fx_image *image)
{
    struct x87_state *fpu = &ARCH(c)->fpu;
    struct fx_image host = *image;
    bool wide = u->mode & UOP_OSZ64;
    host.fip = host.fdp = 0;
    host.mxcsr = mxcsr_get();
    fpu_load_image(&host);
    fpu->fop = image->fop & 0x7ff;
    fpu->fip = wide ? image->fip : (uint32_t)image->fip;
    fpu->fdp = wide ? image->fdp : (uint32_t)image->fdp;
    fpu->fcs = wide ? 0 : (uint16_t)(image->fip >> 32);
    fpu->fds = wide ? 0 : (uint16_t)(image->fdp >> 32);
}

static void put_xmm(const struct cpu *c, struct fx_image *image)
{
    for (unsigned i = 0; i < xmm_count(c); i++) {
        memcpy(image->xmm[i], c->s.arch.vec[i].b, 16);
    }
}

static void get_xmm(struct cpu *c, const struct fx_image *image)
{
    for (unsigned i = 0; i < xmm_count(c); i++) {
        memcpy(ARCH(c)->vec[i].b, image->xmm[i], 16);
    }
}

static void put_mxcsr(struct fx_image *image)
{
    image->mxcsr = mxcsr_get();
    image->mxcsr_mask = MXCSR_MASK;
}

static void check_mxcsr(struct cpu *c, const struct uop *u, uint32_t mxcsr)
{
    if (mxcsr & ~MXCSR_MASK) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

/* ---- FXSAVE, FXRSTOR ---- */

static unsigned fx_bytes(const struct cpu *c) { return (unsigned)offsetof(struct fx_image, xmm) + 16 * xmm_count(c); }

static COLD void fxsave(struct cpu *c, const struct uop *u)
{
    struct fx_image image;
    fpu_gate(c, u, GATE_MMX);
    uint64_t lin = area(c, u, sizeof image, 16, true);
    memset(&image, 0, sizeof image);
    put_x87(c, u, &image);
    put_mxcsr(&image);
    put_xmm(c, &image);
    mem_probe_write(c, u, lin, sizeof image);
    mem_write_bytes(c, u, lin, &image, fx_bytes(c)); /* what follows belongs to software, or to registers not there */
}

static COLD void fxrstor(struct cpu *c, const struct uop *u)
{
    struct fx_image image;
    fpu_gate(c, u, GATE_MMX);
    uint64_t lin = area(c, u, sizeof image, 16, false);
    mem_read_bytes(c, u, lin, &image, sizeof image);
    check_mxcsr(c, u, image.mxcsr);
    get_x87(c, u, &image);
    mxcsr_set(image.mxcsr);
    get_xmm(c, &image);
}

/* ---- XSAVE, XSAVEOPT, XRSTOR ---- */

static void xsave_gate(struct cpu *c, const struct uop *u)
{
    if (!(ARCH(c)->cr4 & CR4_OSXSAVE)) {
        raise_fault(c, u, VEC_UD);
    }
    if (ARCH(c)->cr0 & CR0_TS) {
        raise_fault(c, u, VEC_NM);
    }
}

static uint64_t requested(const struct cpu *c)
{
    return ((uint64_t)(uint32_t)c->s.arch.gpr[RDX] << 32 | (uint32_t)c->s.arch.gpr[RAX]) & c->s.arch.xcr0;
}

/* Components that are not in their initial state (SDM vol. 1 section 13.6) */
static uint64_t in_use(const struct cpu *c, const struct fx_image *host)
{
    const struct x87_state *fpu = &c->s.arch.fpu;
    static const uint8_t zero[sizeof host->st];
    uint64_t bits = host->mxcsr != MXCSR_DEFAULT ? STATE_SSE : 0, any = 0;
    if (host->cw != FCW_DEFAULT || host->sw || host->tags || fpu->fop || fpu->fip || fpu->fdp || fpu->fcs || fpu->fds
        || memcmp(host->st, zero, sizeof zero)) {
        bits |= STATE_X87;
    }
    for (unsigned i = 0; i < xmm_count(c); i++) {
        any |= c->s.arch.vec[i].q[0] | c->s.arch.vec[i].q[1];
    }
    return any ? bits | STATE_SSE : bits;
}

static COLD void save(struct cpu *c, const struct uop *u, bool optimized)
{
    struct xsave_area to;
    xsave_gate(c, u);
    uint64_t lin = area(c, u, AREA, 64, true), rfbm = requested(c);
    mem_probe_write(c, u, lin, AREA); /* a write must be possible even where nothing changes */
    mem_read_bytes(c, u, lin, &to, AREA);
    struct fx_image host;
    fpu_store_image(&host);
    uint64_t used = in_use(c, &host), what = optimized ? rfbm & used : rfbm;
    if (what & STATE_X87) {
        put_x87(c, u, &to.legacy);
    }
    if (what & STATE_SSE) {
        put_xmm(c, &to.legacy);
    }
    if (rfbm & (STATE_SSE | STATE_AVX)) {
        put_mxcsr(&to.legacy);
    }
    to.xstate_bv = (to.xstate_bv & ~rfbm) | (used & rfbm);
    mem_write_bytes(c, u, lin, &to, offsetof(struct xsave_area, xcomp_bv));
}

static COLD void restore(struct cpu *c, const struct uop *u)
{
    struct xsave_area from;
    static const struct fx_image initial = {.cw = FCW_DEFAULT};
    xsave_gate(c, u);
    uint64_t lin = area(c, u, AREA, 64, false), rfbm = requested(c);
    mem_read_bytes(c, u, lin, &from, AREA);
    if (from.xcomp_bv || from.reserved[0] || from.xstate_bv & ~ARCH(c)->xcr0) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    if (rfbm & (STATE_SSE | STATE_AVX)) {
        check_mxcsr(c, u, from.legacy.mxcsr);
        mxcsr_set(from.legacy.mxcsr);
    }
    if (rfbm & STATE_X87) {
        get_x87(c, u, from.xstate_bv & STATE_X87 ? &from.legacy : &initial);
    }
    if (rfbm & STATE_SSE) {
        get_xmm(c, from.xstate_bv & STATE_SSE ? &from.legacy : &initial);
    }
}

void op_fxsave(struct cpu *c, const struct uop *u)
{
    fxsave(c, u);
    NEXT(c, u);
}

void op_fxrstor(struct cpu *c, const struct uop *u)
{
    fxrstor(c, u);
    NEXT(c, u);
}

void op_xsave(struct cpu *c, const struct uop *u)
{
    save(c, u, false);
    NEXT(c, u);
}

void op_xsaveopt(struct cpu *c, const struct uop *u)
{
    save(c, u, true);
    NEXT(c, u);
}

void op_xrstor(struct cpu *c, const struct uop *u)
{
    restore(c, u);
    NEXT(c, u);
}
