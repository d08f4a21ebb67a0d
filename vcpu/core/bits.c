/* BT BTS BTR BTC, BSF BSR, POPCNT, CRC32 (SDM vol. 2). */
#include "sized.h"

/* CF takes the bit; the other status flags keep their values (undefined but for ZF) */
static inline void set_cf(struct cpu *c, unsigned cf) { flags_set_some(c, FLAG_CF, cf); }

#define BIT_bt(B) (a)
#define BIT_bts(B) (a | (U(B))((U(B))1 << n))
#define BIT_btr(B) (a & (U(B)) ~((U(B))1 << n))
#define BIT_btc(B) (a ^ (U(B))((U(B))1 << n))

#define BIT_REGISTER(B, op, how, INDEX)                                                           \
    HANDLER(op_##op##_##how##_##B##_r)                                                            \
    {                                                                                             \
        unsigned n = (unsigned)(INDEX) & (B - 1);                                                 \
        U(B) a = RD_##B(c, u->rm);                                                                \
        WR_##B(c, u->rm, BIT_##op(B));                                                            \
        set_cf(c, (unsigned)(a >> n) & 1);                                                        \
        NEXT(c, u);                                                                               \
    }

/* A register as bit index reaches beyond the operand: the operand-size words of a bit string (SDM vol. 2, BT) */
#define WORD_OFFSET(B) ((int64_t)((S(B))RD_##B(c, u->reg) >> LOG_BITS_##B) * (B / 8))
#define LOG_BITS_16 4
#define LOG_BITS_32 5
#define LOG_BITS_64 6

#define BIT_MEMORY(B, op, how, suffix, LOCKED, INDEX, PLUS)                                       \
    HANDLER(op_##op##_##how##_##B##_##suffix)                                                     \
    {                                                                                             \
        unsigned n = (unsigned)(INDEX) & (B - 1);                                                 \
        int64_t plus = (PLUS);                                                                    \
        RMW_MEMORY_AT(B, LOCKED, ea_linear_plus(c, u, plus, B / 8, true), BIT_##op(B));           \
        set_cf(c, (unsigned)(a >> n) & 1);                                                        \
        NEXT(c, u);                                                                               \
    }

#define BIT_TEST_MEMORY(B, how, INDEX, PLUS)                                                      \
    HANDLER(op_bt_##how##_##B##_m)                                                                \
    {                                                                                             \
        unsigned n = (unsigned)(INDEX) & (B - 1);                                                 \
        U(B) a = mem_read##B(c, u, ea_linear_plus(c, u, (PLUS), B / 8, false));                   \
        set_cf(c, (unsigned)(a >> n) & 1);                                                        \
        NEXT(c, u);                                                                               \
    }

#define BIT_CHANGES(B, op)                                                                        \
    BIT_REGISTER(B, op, eg, GPR(c, u->reg))                                                       \
    BIT_REGISTER(B, op, ei, u->imm)                                                               \
    BIT_MEMORY(B, op, eg, m, 0, GPR(c, u->reg), WORD_OFFSET(B))                                   \
    BIT_MEMORY(B, op, eg, l, 1, GPR(c, u->reg), WORD_OFFSET(B))                                   \
    BIT_MEMORY(B, op, ei, m, 0, u->imm, 0)                                                        \
    BIT_MEMORY(B, op, ei, l, 1, u->imm, 0)

SIZES_V(BIT_CHANGES, bts)
SIZES_V(BIT_CHANGES, btr)
SIZES_V(BIT_CHANGES, btc)

#define BIT_TEST_REGISTER(B, how, INDEX)                                                          \
    HANDLER(op_bt_##how##_##B##_r)                                                                \
    {                                                                                             \
        set_cf(c, (unsigned)(RD_##B(c, u->rm) >> ((INDEX) & (B - 1))) & 1);                       \
        NEXT(c, u);                                                                               \
    }

#define BIT_TESTS(B, ...)                                                                         \
    BIT_TEST_REGISTER(B, eg, GPR(c, u->reg))                                                      \
    BIT_TEST_REGISTER(B, ei, u->imm)                                                              \
    BIT_TEST_MEMORY(B, eg, GPR(c, u->reg), WORD_OFFSET(B))                                        \
    BIT_TEST_MEMORY(B, ei, u->imm, 0)

SIZES_V(BIT_TESTS, )

/* ---- scans: of 0, ZF is set and the destination keeps its value (AMD's promise) ---- */
static inline void scan_flags(struct cpu *c, uint64_t source) { flags_set_some(c, FLAG_ZF, source ? 0 : FLAG_ZF); }

#define SCAN_bsf(v) ((unsigned)__builtin_ctzll(v))
#define SCAN_bsr(v) (63 - (unsigned)__builtin_clzll(v))

#define SCAN_FORM(B, op, suffix, SOURCE)                                                          \
    HANDLER(op_##op##_##B##_##suffix)                                                             \
    {                                                                                             \
        U(B) a = SOURCE;                                                                          \
        scan_flags(c, a);                                                                         \
        if (a) {                                                                                  \
            WR_##B(c, u->reg, SCAN_##op(a));                                                      \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }
#define SCAN(B, op)                                                                               \
    SCAN_FORM(B, op, r, RD_##B(c, u->rm))                                                         \
    SCAN_FORM(B, op, m, mem_read##B(c, u, ea_linear(c, u, B / 8, false)))
SIZES_V(SCAN, bsf)
SIZES_V(SCAN, bsr)

/* Everything but ZF is cleared */
#define POPCNT_FORM(B, suffix, SOURCE)                                                            \
    HANDLER(op_popcnt_##B##_##suffix)                                                             \
    {                                                                                             \
        uint64_t a = SOURCE;                                                                      \
        WR_##B(c, u->reg, __builtin_popcountll(a));                                               \
        flags_set_status(c, a ? 0 : FLAG_ZF);                                                     \
        NEXT(c, u);                                                                               \
    }
#define POPCNT(B, ...)                                                                            \
    POPCNT_FORM(B, r, RD_##B(c, u->rm))                                                           \
    POPCNT_FORM(B, m, mem_read##B(c, u, ea_linear(c, u, B / 8, false)))
SIZES_V(POPCNT, )

/* ---- CRC32: CRC-32C, bits reflected (polynomial 11EDC6F41h) ---- */
static uint32_t crc32c(uint32_t crc, uint64_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++) {
        crc ^= (uint8_t)(v >> (8 * i));
        for (unsigned bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
        }
    }
    return crc;
}

/* the destination is 32 bits wide, zero-extended, also with REX.W */
HANDLER(op_crc32_8_r) { WR_32(c, u->reg, crc32c(RD_32(c, u->reg), REG8(c, u->rm), 1)); NEXT(c, u); }

HANDLER(op_crc32_8_m)
{
    uint8_t b = mem_read8(c, u, ea_linear(c, u, 1, false));
    WR_32(c, u->reg, crc32c(RD_32(c, u->reg), b, 1));
    NEXT(c, u);
}

#define CRC32(B, ...)                                                                             \
    HANDLER(op_crc32_##B##_r)                                                                     \
    {                                                                                             \
        WR_32(c, u->reg, crc32c(RD_32(c, u->reg), RD_##B(c, u->rm), B / 8));                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_crc32_##B##_m)                                                                     \
    {                                                                                             \
        U(B) b = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                                \
        WR_32(c, u->reg, crc32c(RD_32(c, u->reg), b, B / 8));                                     \
        NEXT(c, u);                                                                               \
    }
SIZES_V(CRC32, )
