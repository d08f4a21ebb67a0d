/* MUL IMUL DIV IDIV, and the decimal adjustments that multiply and divide by ten or not at all (SDM vol. 2). */
#include "sized.h"

/* ---- MUL and IMUL of one operand: rDX:rAX, or AX for bytes. CF = OF = the upper half matters ---- */
static inline void mul_8(struct cpu *c, uint8_t b)
{
    uint16_t wide = (uint16_t)(REG8(c, 0) * b);
    REG16(c, RAX) = wide;
    lazy_set(c, LAZY(LAZY_MUL, LOG2_8), 0, wide >> 8 != 0, (uint8_t)wide);
}

static inline void imul1_8(struct cpu *c, uint8_t b)
{
    int16_t wide = (int16_t)((int8_t)REG8(c, 0) * (int8_t)b);
    REG16(c, RAX) = (uint16_t)wide;
    lazy_set(c, LAZY(LAZY_MUL, LOG2_8), 0, wide != (int8_t)wide, (uint8_t)wide);
}

#define MULTIPLY(B, WIDE, SWIDE)                                                                  \
    static inline void mul_##B(struct cpu *c, U(B) b)                                             \
    {                                                                                             \
        WIDE wide = (WIDE)RD_##B(c, RAX) * b;                                                     \
        WR_##B(c, RAX, (U(B))wide);                                                               \
        WR_##B(c, RDX, (U(B))(wide >> B));                                                        \
        lazy_set(c, LAZY(LAZY_MUL, LOG2_##B), 0, wide >> B != 0, (U(B))wide);                     \
    }                                                                                             \
    static inline void imul1_##B(struct cpu *c, U(B) b)                                           \
    {                                                                                             \
        SWIDE wide = (SWIDE)(S(B))RD_##B(c, RAX) * (S(B))b;                                       \
        WR_##B(c, RAX, (U(B))wide);                                                               \
        WR_##B(c, RDX, (U(B))(wide >> B));                                                        \
        lazy_set(c, LAZY(LAZY_MUL, LOG2_##B), 0, wide != (S(B))wide, (U(B))wide);                 \
    }
MULTIPLY(16, uint32_t, int32_t)
MULTIPLY(32, uint64_t, int64_t)
MULTIPLY(64, unsigned __int128, __int128)

/* ---- DIV and IDIV: #DE for 0 and for quotients that do not fit. Flags are undefined: left alone ---- */
static inline void div_8(struct cpu *c, const struct uop *u, uint8_t b)
{
    unsigned a = REG16(c, RAX);
    if (b == 0 || a / b > UINT8_MAX) {
        raise_fault(c, u, VEC_DE);
    }
    REG16(c, RAX) = (uint16_t)(a / b | (a % b) << 8);
}

static inline void idiv_8(struct cpu *c, const struct uop *u, uint8_t b8)
{
    int a = (int16_t)REG16(c, RAX), b = (int8_t)b8;
    if (b == 0 || a / b != (int8_t)(a / b)) {
        raise_fault(c, u, VEC_DE);
    }
    REG16(c, RAX) = (uint16_t)((uint8_t)(a / b) | (uint8_t)(a % b) << 8);
}

#define DIVIDE(B, WIDE, SWIDE)                                                                    \
    static inline void div_##B(struct cpu *c, const struct uop *u, U(B) b)                        \
    {                                                                                             \
        U(B) high = RD_##B(c, RDX);                                                               \
        if (high >= b) {                                                                          \
            raise_fault(c, u, VEC_DE);                                                            \
        }                                                                                         \
        WIDE a = (WIDE)high << B | RD_##B(c, RAX);                                                \
        if (B == 64 && high == 0) { /* spare the 128-bit division */                              \
            uint64_t low = RD_64(c, RAX);                                                         \
            WR_##B(c, RAX, low / b);                                                              \
            WR_##B(c, RDX, low % b);                                                              \
            return;                                                                               \
        }                                                                                         \
        WR_##B(c, RAX, (U(B))(a / b));                                                            \
        WR_##B(c, RDX, (U(B))(a % b));                                                            \
    }                                                                                             \
    static inline void idiv_##B(struct cpu *c, const struct uop *u, U(B) b_)                      \
    {                                                                                             \
        S(B) b = (S(B))b_;                                                                        \
        SWIDE a = (SWIDE)((WIDE)RD_##B(c, RDX) << B | RD_##B(c, RAX));                            \
        WIDE least = (WIDE)1 << (2 * B - 1);                                                      \
        if (b == 0 || (b == -1 && (WIDE)a == least) || a / b != (S(B))(a / b)) {                  \
            raise_fault(c, u, VEC_DE);                                                            \
        }                                                                                         \
        S(B) quotient = (S(B))(a / b), remainder = (S(B))(a % b);                                 \
        WR_##B(c, RAX, (U(B))quotient);                                                           \
        WR_##B(c, RDX, (U(B))remainder);                                                          \
    }
DIVIDE(16, uint32_t, int32_t)
DIVIDE(32, uint64_t, int64_t)
DIVIDE(64, unsigned __int128, __int128)

#define ONE_OPERAND(B, op, CALL)                                                                  \
    HANDLER(op_##op##_##B##_r)                                                                    \
    {                                                                                             \
        U(B) b = RD_##B(c, u->rm);                                                                \
        CALL;                                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##B##_m)                                                                    \
    {                                                                                             \
        U(B) b = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                                \
        CALL;                                                                                     \
        NEXT(c, u);                                                                               \
    }
#define ALL_ONE_OPERAND(B, ...)                                                                   \
    ONE_OPERAND(B, mul, mul_##B(c, b))                                                            \
    ONE_OPERAND(B, imul1, imul1_##B(c, b))                                                        \
    ONE_OPERAND(B, div, div_##B(c, u, b))                                                         \
    ONE_OPERAND(B, idiv, idiv_##B(c, u, b))
SIZES(ALL_ONE_OPERAND, )

/* ---- IMUL of two and three operands ---- */
#define IMUL_RESULT(B, SWIDE)                                                                     \
    SWIDE wide = (SWIDE)(S(B))a * (S(B))b;                                                        \
    lazy_set(c, LAZY(LAZY_MUL, LOG2_##B), 0, wide != (S(B))wide, (U(B))wide);                     \
    WR_##B(c, u->reg, (U(B))wide)

#define IMUL(B, SWIDE)                                                                            \
    HANDLER(op_imul2_##B##_r)                                                                     \
    {                                                                                             \
        U(B) a = RD_##B(c, u->reg), b = RD_##B(c, u->rm);                                         \
        IMUL_RESULT(B, SWIDE);                                                                    \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_imul2_##B##_m)                                                                     \
    {                                                                                             \
        U(B) b = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), a = RD_##B(c, u->reg);         \
        IMUL_RESULT(B, SWIDE);                                                                    \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_imul2_##B##_f)                                                                     \
    {                                                                                             \
        FAST_READ(B, op_imul2_##B##_m, p);                                                        \
        U(B) a = RD_##B(c, u->reg), b = *p;                                                       \
        IMUL_RESULT(B, SWIDE);                                                                    \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_imul3_##B##_r)                                                                     \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = (U(B))u->imm;                                              \
        IMUL_RESULT(B, SWIDE);                                                                    \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_imul3_##B##_m)                                                                     \
    {                                                                                             \
        U(B) a = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), b = (U(B))u->imm;              \
        IMUL_RESULT(B, SWIDE);                                                                    \
        NEXT(c, u);                                                                               \
    }
IMUL(16, int32_t)
IMUL(32, int64_t)
IMUL(64, __int128)

/* ---- decimal adjustment, SDM vol. 2 pseudo-code ---- */
static inline void result_flags(struct cpu *c, uint8_t al, unsigned cf, unsigned af)
{
    lazy_set(c, LAZY(LAZY_LOGIC, LOG2_8), 0, 0, al);
    flags_set_status(c, (flags_get(c) & ~(uint64_t)FLAG_AF) | cf | af << 4);
}

static void decimal(struct cpu *c, int sign)
{
    uint8_t al = REG8(c, 0), old = al;
    uint64_t f = flags_get(c);
    unsigned cf = 0, af = 0;
    if ((al & 15) > 9 || f & FLAG_AF) {
        cf = (f & FLAG_CF) || (sign > 0 ? al > 0xf9 : al < 6);
        al = (uint8_t)(al + sign * 6);
        af = 1;
    }
    if (old > 0x99 || f & FLAG_CF) {
        al = (uint8_t)(al + sign * 0x60);
        cf = 1;
    }
    REG8(c, 0) = al;
    result_flags(c, al, cf, af);
}

HANDLER(op_daa) { decimal(c, 1); NEXT(c, u); }
HANDLER(op_das) { decimal(c, -1); NEXT(c, u); }

static void ascii(struct cpu *c, int sign)
{
    unsigned adjust = (REG8(c, 0) & 15) > 9 || flags_get(c) & FLAG_AF;
    if (adjust) {
        REG16(c, RAX) = (uint16_t)(REG16(c, RAX) + sign * 6);
        REG8(c, 1) = (uint8_t)(REG8(c, 1) + sign);
    }
    REG8(c, 0) &= 15;
    result_flags(c, REG8(c, 0), adjust, adjust);
}

/* AAA adds 106h to AX, AAS subtracts 6 from AX and 1 from AH */
HANDLER(op_aaa) { ascii(c, 1); NEXT(c, u); }
HANDLER(op_aas) { ascii(c, -1); NEXT(c, u); }

HANDLER(op_aam)
{
    uint8_t base = (uint8_t)u->imm, al = REG8(c, 0);
    if (base == 0) {
        raise_fault(c, u, VEC_DE);
    }
    REG16(c, RAX) = (uint16_t)(al / base << 8 | al % base);
    result_flags(c, REG8(c, 0), 0, 0);
    NEXT(c, u);
}

HANDLER(op_aad)
{
    uint8_t al = (uint8_t)(REG8(c, 0) + REG8(c, 1) * (uint8_t)u->imm);
    REG16(c, RAX) = al;
    result_flags(c, al, 0, 0);
    NEXT(c, u);
}
