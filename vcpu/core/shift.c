/* Shifts and rotates, SHLD and SHRD (SDM vol. 2). A count of 0 (after masking) leaves all flags alone. */
#include "sized.h"

#define COUNT_i(B) ((unsigned)u->imm & ((B) == 64 ? 63 : 31))
#define COUNT_1(B) 1u
#define COUNT_c(B) ((unsigned)REG8(c, RCX * 8) & ((B) == 64 ? 63 : 31))

/* ---- SHL SHR SAR: value; count 1 to 63 ---- */
#define VAL_shl(B) ((U(B))((uint64_t)a << n))
#define VAL_shr(B) ((U(B))((uint64_t)a >> n))
#define VAL_sar(B) ((U(B))((int64_t)(S(B))a >> n))
#define LAZY_shl LAZY_SHL
#define LAZY_shr LAZY_SHR
#define LAZY_sar LAZY_SAR

#define SHIFT_FORM(B, op, how)                                                                    \
    HANDLER(op_##op##_##how##_##B##_r)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) a = RD_##B(c, u->rm), r = VAL_##op(B);                                               \
        if (n) {                                                                                  \
            lazy_set(c, LAZY(LAZY_##op, LOG2_##B), a, n, r);                                      \
        }                                                                                         \
        WR_##B(c, u->rm, r);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_r_nf)                                                         \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) a = RD_##B(c, u->rm);                                                                \
        WR_##B(c, u->rm, VAL_##op(B));                                                            \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_m)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        RMW_MEMORY(B, 0, VAL_##op(B));                                                            \
        if (n) {                                                                                  \
            lazy_set(c, LAZY(LAZY_##op, LOG2_##B), a, n, VAL_##op(B));                            \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

#define SHIFT(B, op) SHIFT_FORM(B, op, i) SHIFT_FORM(B, op, 1) SHIFT_FORM(B, op, c)
SIZES(SHIFT, shl)
SIZES(SHIFT, shr)
SIZES(SHIFT, sar)

/* ---- rotates: CF and OF alone ---- */
static inline void rotate_flags(struct cpu *c, unsigned cf, unsigned of)
{
    flags_set_some(c, FLAG_CF | FLAG_OF, cf | of << 11);
}

/* n is the masked count; for 8 and 16 bits it may be more than the width */
#define VAL_rol(B) ((U(B))(a << (n & (B - 1)) | a >> (-n & (B - 1))))
#define VAL_ror(B) ((U(B))(a >> (n & (B - 1)) | a << (-n & (B - 1))))
#define TOP(B, v) (((v) >> (B - 1)) & 1)
#define FLAGS_rol(B) rotate_flags(c, r & 1, TOP(B, r) ^ (r & 1))
#define FLAGS_ror(B) rotate_flags(c, TOP(B, r), TOP(B, r) ^ ((r >> (B - 2)) & 1))

#define ROTATE_FORM(B, op, how)                                                                   \
    HANDLER(op_##op##_##how##_##B##_r)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) a = RD_##B(c, u->rm), r = VAL_##op(B);                                               \
        WR_##B(c, u->rm, r);                                                                      \
        if (n) {                                                                                  \
            FLAGS_##op(B);                                                                        \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_r_nf)                                                         \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) a = RD_##B(c, u->rm);                                                                \
        WR_##B(c, u->rm, VAL_##op(B));                                                            \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_m)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        RMW_MEMORY(B, 0, VAL_##op(B));                                                            \
        U(B) r = VAL_##op(B);                                                                     \
        if (n) {                                                                                  \
            FLAGS_##op(B);                                                                        \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

#define ROTATE(B, op) ROTATE_FORM(B, op, i) ROTATE_FORM(B, op, 1) ROTATE_FORM(B, op, c)
SIZES(ROTATE, rol)
SIZES(ROTATE, ror)

/* ---- RCL, RCR: rotates of B + 1 bits ---- */
/* of CF:a (CF is bit `bits`) by n to the left, n <= bits; the new CF is bit `bits` of the result (for 64: bit 64) */
static inline unsigned __int128 rcl_wide(unsigned bits, uint64_t a, unsigned cf, unsigned n)
{
    unsigned __int128 wide = (unsigned __int128)cf << bits | a, mask = ((unsigned __int128)1 << (bits + 1)) - 1;
    return n ? (wide << n | wide >> (bits + 1 - n)) & mask : wide;
}

#define TURN_rcl(B) (n % (B + 1))
#define TURN_rcr(B) ((B + 1 - n % (B + 1)) % (B + 1))
#define OF_rcl(B) (TOP(B, r) ^ cf)
#define OF_rcr(B) (TOP(B, r) ^ ((r >> (B - 2)) & 1))

#define CARRY_ROTATE_FORM(B, op, how)                                                             \
    HANDLER(op_##op##_##how##_##B##_r)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        unsigned __int128 w = rcl_wide(B, RD_##B(c, u->rm), flag_cf(c), TURN_##op(B));            \
        U(B) r = (U(B))w;                                                                         \
        unsigned cf = (unsigned)(w >> B) & 1;                                                     \
        WR_##B(c, u->rm, r);                                                                      \
        if (n) {                                                                                  \
            rotate_flags(c, cf, OF_##op(B));                                                      \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_m)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        RMW_MEMORY(B, 0, rcl_wide(B, a, flag_cf(c), TURN_##op(B)));                               \
        unsigned __int128 w = rcl_wide(B, a, flag_cf(c), TURN_##op(B));                           \
        U(B) r = (U(B))w;                                                                         \
        unsigned cf = (unsigned)(w >> B) & 1;                                                     \
        if (n) {                                                                                  \
            rotate_flags(c, cf, OF_##op(B));                                                      \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

#define CARRY_ROTATE(B, op) CARRY_ROTATE_FORM(B, op, i) CARRY_ROTATE_FORM(B, op, 1) CARRY_ROTATE_FORM(B, op, c)
SIZES(CARRY_ROTATE, rcl)
SIZES(CARRY_ROTATE, rcr)

/* ---- SHLD, SHRD. 16 bits with a count over 16: undefined; the bits of dest:src:dest as on hardware of both makers ---- */
static inline uint64_t shld(unsigned bits, uint64_t a, uint64_t b, unsigned n)
{
    if (bits == 16) {
        uint64_t wide = a << 32 | b << 16 | a;
        return (wide << n) >> 32;
    }
    return n ? a << n | b >> (bits - n) : a;
}

static inline uint64_t shrd(unsigned bits, uint64_t a, uint64_t b, unsigned n)
{
    if (bits == 16) {
        uint64_t wide = a << 32 | b << 16 | a;
        return wide >> n;
    }
    return n ? a >> n | b << (bits - n) : a;
}

/* CF: the last bit shifted out; OF: the sign changed (defined for a count of 1) */
static inline void double_shift_flags(struct cpu *c, unsigned log2, uint64_t r, unsigned cf, unsigned of)
{
    lazy_set(c, LAZY(LAZY_LOGIC, log2), 0, 0, r);
    flags_set_status(c, (flags_get(c) & ~(uint64_t)(FLAG_CF | FLAG_OF)) | cf | of << 11);
}

#define CF_shld(B) ((B) == 16 && n > 16 ? (unsigned)(b >> (32 - n)) & 1 : (unsigned)(a >> ((B - n) & 63)) & 1)
#define CF_shrd(B) ((B) == 16 && n > 16 ? (unsigned)(b >> (n - 17)) & 1 : (unsigned)(a >> (n - 1)) & 1)

#define DOUBLE_SHIFT_FORM(B, op, how)                                                             \
    HANDLER(op_##op##_##how##_##B##_r)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg), r = (U(B))op(B, a, b, n);               \
        WR_##B(c, u->rm, r);                                                                      \
        if (n) {                                                                                  \
            double_shift_flags(c, LOG2_##B, r, CF_##op(B), TOP(B, (U(B))(r ^ a)));                \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##how##_##B##_m)                                                            \
    {                                                                                             \
        unsigned n = COUNT_##how(B);                                                              \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 0, op(B, a, b, n));                                                         \
        U(B) r = (U(B))op(B, a, b, n);                                                            \
        if (n) {                                                                                  \
            double_shift_flags(c, LOG2_##B, r, CF_##op(B), TOP(B, (U(B))(r ^ a)));                \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

#define DOUBLE_SHIFT(B, op) DOUBLE_SHIFT_FORM(B, op, i) DOUBLE_SHIFT_FORM(B, op, c)
SIZES_V(DOUBLE_SHIFT, shld)
SIZES_V(DOUBLE_SHIFT, shrd)
