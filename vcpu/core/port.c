/* IN OUT INS OUTS (SDM vol. 2; permission: vol. 1 section 18.5). uop.aux is 1 in the rows for bytes. */
#include "block.h"
#include "io.h"
#include "strops.h"
#include "system.h"

static unsigned width_of(const struct uop *u) { return u->aux == 1 ? 1 : u->mode & UOP_OSZ16 ? 2 : 4; }

static void in(struct cpu *c, const struct uop *u, unsigned port)
{
    unsigned width = width_of(u);
    io_check(c, u, port, width);
    uint32_t v = io_read(c, u, port, width);
    debug_io(c, port, width);
    if (width == 4) {
        GPR(c, RAX) = v;
    } else if (width == 2) {
        REG16(c, RAX) = (uint16_t)v;
    } else {
        REG8(c, 0) = (uint8_t)v;
    }
}

static void out(struct cpu *c, const struct uop *u, unsigned port)
{
    unsigned width = width_of(u);
    io_check(c, u, port, width);
    io_write(c, u, port, width, (uint32_t)(GPR(c, RAX) & (UINT32_MAX >> (32 - 8 * width))));
    debug_io(c, port, width);
}

HANDLER(op_in_i) { in(c, u, (unsigned)u->imm & 0xff); NEXT(c, u); }
HANDLER(op_in_d) { in(c, u, REG16(c, RDX)); NEXT(c, u); }
HANDLER(op_out_i) { out(c, u, (unsigned)u->imm & 0xff); NEXT(c, u); }
HANDLER(op_out_d) { out(c, u, REG16(c, RDX)); NEXT(c, u); }

/* How many of count items, the first of which has passed its checks, can go at once: forward, in the page of lin, before the
 * offset wraps and within the segment. Firmware reads whole sectors in real mode, so segments must not stop this. */
static unsigned run_length(const struct cpu *c, const struct uop *u, unsigned segment, unsigned r, uint64_t lin, unsigned width,
                           uint64_t count)
{
    if (ARCH(c)->rflags & FLAG_DF || c->mode & MODE_SINGLE) {
        return 1;
    }
    uint64_t room = SEG_PAGE - (lin & (SEG_PAGE - 1)), offset = string_register(c, u, r);
    if (!(c->mode & MODE_64) || u->mode & UOP_ASZ32) {
        uint64_t before_wrap = (u->mode & UOP_ASZ16 ? UINT64_C(0x10000) : UINT64_C(1) << 32) - offset;
        room = room < before_wrap ? room : before_wrap;
    }
    if (!(c->mode & MODE_64)) {
        const struct seg_reg *s = &ARCH(c)->seg[segment];
        if ((s->attr & 0x1c) == 0x14) {
            return 1; /* data that expands down */
        }
        uint64_t before_limit = (uint64_t)s->limit + 1 - offset;
        room = room < before_limit ? room : before_limit;
    }
    uint64_t fits = room / width;
    return fits == 0 ? 1 : (unsigned)(fits < count ? fits : count);
}

/* One message's worth; count is what the registers ask for. Returns the items done. */
static unsigned ins(struct cpu *c, const struct uop *u, uint64_t count)
{
    uint8_t data[SEG_PAGE];
    unsigned width = width_of(u), port = REG16(c, RDX);
    io_check(c, u, port, width);
    uint64_t lin = string_target(c, u, width, true);
    unsigned n = run_length(c, u, ES, RDI, lin, width, count);
    mem_probe_write(c, u, lin, n * width);
    n = io_read_string(c, u, port, width, n, data);
    debug_io(c, port, width);
    mem_write_bytes(c, u, lin, data, n * width);
    string_advance(c, u, RDI, ARCH(c)->rflags & FLAG_DF ? -(int64_t)width : (int64_t)(n * width));
    return n;
}

static unsigned outs(struct cpu *c, const struct uop *u, uint64_t count)
{
    uint8_t data[SEG_PAGE];
    unsigned width = width_of(u), port = REG16(c, RDX);
    io_check(c, u, port, width);
    uint64_t lin = string_source(c, u, width);
    unsigned n = run_length(c, u, u->seg, RSI, lin, width, count);
    mem_read_bytes(c, u, lin, data, n * width);
    n = io_write_string(c, u, port, width, n, data);
    debug_io(c, port, width);
    string_advance(c, u, RSI, ARCH(c)->rflags & FLAG_DF ? -(int64_t)width : (int64_t)(n * width));
    return n;
}

#define PORT_STRING(op)                                                                           \
    HANDLER(op_##op)                                                                              \
    {                                                                                             \
        if (!(u->mode & (UOP_REP | UOP_REPNE))) {                                                 \
            op(c, u, 1);                                                                          \
            NEXT(c, u);                                                                           \
        }                                                                                         \
        uint64_t count;                                                                           \
        while ((count = string_counter(c, u)) != 0) {                                             \
            count -= op(c, u, count);                                                             \
            string_count(c, u, count);                                                            \
            if (count && (*(volatile uint32_t *)&c->s.attention || c->mode & MODE_SINGLE)) {      \
                return leave_at(c, u);                                                            \
            }                                                                                     \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }
PORT_STRING(ins)
PORT_STRING(outs)
