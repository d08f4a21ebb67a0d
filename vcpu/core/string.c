/*
 * MOVS CMPS STOS LODS SCAS, with REP by pages where both sides are plain memory (SDM vol. 2, REP).
 *
 * A repeated instruction keeps its registers up to date after each item or chunk, so a fault in the middle leaves
 * what hardware leaves, and attention leaves to the run loop with rip still at the instruction.
 */
#include "block.h"
#include "strops.h"

static inline bool repeated(const struct uop *u) { return u->mode & (UOP_REP | UOP_REPNE); }

#define STEP(B) (ARCH(c)->rflags & FLAG_DF ? -(int64_t)(B / 8) : (int64_t)(B / 8))

/* ---- one item ---- */
#define ONE_ITEM(B, ...)                                                                          \
    static inline void movs_one_##B(struct cpu *c, const struct uop *u)                           \
    {                                                                                             \
        U(B) v = mem_read##B(c, u, string_source(c, u, B / 8));                                   \
        mem_write##B(c, u, string_target(c, u, B / 8, true), v);                                  \
        string_advance(c, u, RSI, STEP(B));                                                       \
        string_advance(c, u, RDI, STEP(B));                                                       \
    }                                                                                             \
    static inline void stos_one_##B(struct cpu *c, const struct uop *u)                           \
    {                                                                                             \
        mem_write##B(c, u, string_target(c, u, B / 8, true), RD_##B(c, RAX));                     \
        string_advance(c, u, RDI, STEP(B));                                                       \
    }                                                                                             \
    static inline void lods_one_##B(struct cpu *c, const struct uop *u)                           \
    {                                                                                             \
        WR_##B(c, RAX, mem_read##B(c, u, string_source(c, u, B / 8)));                            \
        string_advance(c, u, RSI, STEP(B));                                                       \
    }                                                                                             \
    /* compares: the operands, and whether they are equal. ES:RDI is looked at first, as hardware does where both fault */ \
    static inline bool cmps_one_##B(struct cpu *c, const struct uop *u, U(B) *x, U(B) *y)         \
    {                                                                                             \
        *y = mem_read##B(c, u, string_target(c, u, B / 8, false));                                \
        *x = mem_read##B(c, u, string_source(c, u, B / 8));                                       \
        string_advance(c, u, RSI, STEP(B));                                                       \
        string_advance(c, u, RDI, STEP(B));                                                       \
        return *x == *y;                                                                          \
    }                                                                                             \
    static inline bool scas_one_##B(struct cpu *c, const struct uop *u, U(B) *x, U(B) *y)         \
    {                                                                                             \
        *x = RD_##B(c, RAX);                                                                      \
        *y = mem_read##B(c, u, string_target(c, u, B / 8, false));                                \
        string_advance(c, u, RDI, STEP(B));                                                       \
        return *x == *y;                                                                          \
    }
SIZES(ONE_ITEM, )

/* ---- chunks: forward, flat addresses, both sides direct, within a page each. Items done, or 0 ---- */
static inline unsigned items_in_page(uint64_t lin, unsigned n) { return (unsigned)(SEG_PAGE - (lin & (SEG_PAGE - 1))) / n; }

static bool chunks_possible(const struct cpu *c, const struct uop *u)
{
    return c->mode & (MODE_64 | MODE_FLAT) && !(c->mode & MODE_SINGLE) && !(ARCH(c)->rflags & FLAG_DF) && !(u->mode & UOP_ASZ16) &&
           (c->mode & MODE_64 || u->seg == DS || u->seg == ES || u->seg == SS);
}

#define CHUNKS(B, ...)                                                                            \
    static unsigned movs_chunk_##B(struct cpu *c, const struct uop *u, uint64_t count)            \
    {                                                                                             \
        if (!chunks_possible(c, u)) {                                                             \
            return 0;                                                                             \
        }                                                                                         \
        uint64_t source = string_source(c, u, B / 8), target = string_target(c, u, B / 8, true);  \
        const uint8_t *from = mem_direct(c, source, false);                                       \
        uint8_t *to = mem_direct(c, target, true);                                                \
        unsigned n = items_in_page(source, B / 8), limit = items_in_page(target, B / 8);          \
        n = n < limit ? n : limit;                                                                \
        n = n < count ? n : (unsigned)count;                                                      \
        if (!from || !to || !n) {                                                                 \
            return 0;                                                                             \
        }                                                                                         \
        if ((uint64_t)(to - from) >= n * (B / 8)) {                                               \
            memmove(to, from, n * (B / 8));                                                       \
        } else { /* overlapping forward copy repeats a pattern */                                 \
            for (unsigned i = 0; i < n; i++) {                                                    \
                ((volatile any##B *)to)[i] = ((const volatile any##B *)from)[i];                  \
            }                                                                                     \
        }                                                                                         \
        string_advance(c, u, RSI, n * (B / 8));                                                   \
        string_advance(c, u, RDI, n * (B / 8));                                                   \
        string_count(c, u, count - n);                                                            \
        code_check(c, to, n * (B / 8));                                                           \
        return n;                                                                                 \
    }                                                                                             \
    static unsigned stos_chunk_##B(struct cpu *c, const struct uop *u, uint64_t count)            \
    {                                                                                             \
        if (!chunks_possible(c, u)) {                                                             \
            return 0;                                                                             \
        }                                                                                         \
        uint64_t target = string_target(c, u, B / 8, true);                                       \
        uint8_t *to = mem_direct(c, target, true);                                                \
        unsigned n = items_in_page(target, B / 8);                                                \
        n = n < count ? n : (unsigned)count;                                                      \
        if (!to || !n) {                                                                          \
            return 0;                                                                             \
        }                                                                                         \
        U(B) v = RD_##B(c, RAX);                                                                  \
        if (v == (U(B))((v & 0xff) * (U(B))0x0101010101010101u)) {                                \
            memset(to, (int)(v & 0xff), n * (B / 8));                                             \
        } else {                                                                                  \
            for (unsigned i = 0; i < n; i++) {                                                    \
                ((any##B *)to)[i] = v;                                                            \
            }                                                                                     \
        }                                                                                         \
        string_advance(c, u, RDI, n * (B / 8));                                                   \
        string_count(c, u, count - n);                                                            \
        code_check(c, to, n * (B / 8));                                                           \
        return n;                                                                                 \
    }
SIZES(CHUNKS, )

/* ---- repetition ---- */
/* After an item or chunk: should the run loop have a look before the next? */
static inline bool interrupted(const struct cpu *c)
{
    return *(const volatile uint32_t *)&c->s.attention || c->mode & MODE_SINGLE;
}

#define MOVING(B, op, CHUNK)                                                                      \
    HANDLER(op_##op##_##B)                                                                        \
    {                                                                                             \
        if (!repeated(u)) {                                                                       \
            op##_one_##B(c, u);                                                                   \
            NEXT(c, u);                                                                           \
        }                                                                                         \
        uint64_t count;                                                                           \
        while ((count = string_counter(c, u)) != 0) {                                             \
            if (!(CHUNK)) {                                                                       \
                op##_one_##B(c, u);                                                               \
                string_count(c, u, count - 1);                                                    \
            }                                                                                     \
            if (unlikely(interrupted(c)) && string_counter(c, u)) {                               \
                return leave_at(c, u);                                                            \
            }                                                                                     \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

/* Flags are set when the instruction ends or is interrupted, not when it faults (SDM vol. 2, REP) */
#define COMPARING(B, op)                                                                          \
    static bool op##_repeated_##B(struct cpu *c, const struct uop *u)                             \
    {                                                                                             \
        U(B) x = 0, y = 0;                                                                        \
        bool any = false, more = false;                                                           \
        uint64_t count;                                                                           \
        while ((count = string_counter(c, u)) != 0) {                                             \
            bool equal = op##_one_##B(c, u, &x, &y);                                              \
            string_count(c, u, count - 1);                                                        \
            any = true;                                                                           \
            if (equal != !(u->mode & UOP_REPNE) || count == 1) {                                  \
                break;                                                                            \
            }                                                                                     \
            if (unlikely(interrupted(c))) {                                                       \
                more = true;                                                                      \
                break;                                                                            \
            }                                                                                     \
        }                                                                                         \
        if (any) {                                                                                \
            lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), x, y, (U(B))(x - y));                           \
        }                                                                                         \
        return more;                                                                              \
    }                                                                                             \
    static void op##_single_##B(struct cpu *c, const struct uop *u)                               \
    {                                                                                             \
        U(B) x, y;                                                                                \
        op##_one_##B(c, u, &x, &y);                                                               \
        lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), x, y, (U(B))(x - y));                               \
    }                                                                                             \
    HANDLER(op_##op##_##B)                                                                        \
    {                                                                                             \
        if (!repeated(u)) {                                                                       \
            op##_single_##B(c, u);                                                                \
        } else if (op##_repeated_##B(c, u)) {                                                     \
            return leave_at(c, u);                                                                \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

#define STRINGS(B, ...)                                                                           \
    MOVING(B, movs, movs_chunk_##B(c, u, count))                                                  \
    MOVING(B, stos, stos_chunk_##B(c, u, count))                                                  \
    MOVING(B, lods, 0)                                                                            \
    COMPARING(B, cmps)                                                                            \
    COMPARING(B, scas)
SIZES(STRINGS, )
