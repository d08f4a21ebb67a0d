/*
 * What is done to a block before it runs: status flags that nobody can see are not computed.
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
}
