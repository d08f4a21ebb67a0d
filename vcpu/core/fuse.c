/*
 * What is done to a block before it runs: status flags that nobody can see are not computed, and a comparison takes
 * the conditional branch behind it along (fused.c).
 *
 * Flags are dead behind an instruction when a later one of the block writes all of them, and none between (nor that
 * one, before it writes) reads them, can fault, or leaves the block: register forms of the rows with an `nf` handler.
 */
#include "block.h"
#include "decode.h"
#include "flags.h"

/* Register forms that can neither fault nor leave: those of rows which have nothing but fixed effects. The table knows them by
 * their nf handler; moves and LEA have no flags and are known by their row's handler. */
static bool harmless(const struct uop *u, const struct decoded *d)
{
    if (!d->row || d->row->bits & (OPF_END | OPF_JUMP | OPF_HOST | OPF_CPL0)) {
        return false;
    }
    return d->nf || (d->row->bits & OPF_PURE && (!uop_mem(u) || d->row->mod == OPM_MEM));
}

#define JCC(M) M(o) M(no) M(b) M(nb) M(z) M(nz) M(be) M(nbe) M(s) M(ns) M(p) M(np) M(l) M(nl) M(le) M(nle)
#define DECLARE(cc) void op_j_##cc(struct cpu *c, const struct uop *u);
#define NAME(cc) op_j_##cc,
JCC(DECLARE)

static bool is_jcc(const struct uop *u)
{
    static const uop_fn jcc[16] = {JCC(NAME)};
    return u->aux < 16 && u->fn == jcc[u->aux];
}

void block_optimise(struct uop *u, unsigned n, const struct decoded *d)
{
    unsigned live = FLAGS_STATUS; /* behind instruction i */
    for (unsigned i = n; i-- > 0;) {
        if (!harmless(&u[i], &d[i])) {
            live = FLAGS_STATUS;
            continue;
        }
        const struct oprow *row = d[i].row;
        unsigned writes = row->flags_written & FLAGS_STATUS;
        if (d[i].nf && writes && !(live & writes)) {
            u[i].fn = d[i].nf;
        }
        bool certain = !(row->bits & OPF_MAYBE) || (row->imm == IMM_B && u[i].imm & 31); /* a shift by 0 writes nothing */
        if (certain) {
            live &= ~writes;
        }
        live |= row->flags_read & FLAGS_STATUS;
    }
    if (n >= 3 && is_jcc(&u[n - 2])) {
        uop_fn fused = fused_compare(u[n - 3].fn, u[n - 2].aux);
        if (fused) {
            u[n - 3].fn = fused;
        }
    }
}
