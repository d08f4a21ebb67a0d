/* MOV and its kin: MOVZX MOVSX LEA XCHG XLAT CMOVcc SETcc CMPXCHG XADD, sign extension, MOVNTI (SDM vol. 2). */
#include "sized.h"

#define MOVES(B, ...)                                                                             \
    HANDLER(op_mov_eg_##B##_r)                                                                    \
    {                                                                                             \
        WR_##B(c, u->rm, RD_##B(c, u->reg));                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_eg_##B##_m)                                                                    \
    {                                                                                             \
        mem_write##B(c, u, ea_linear(c, u, B / 8, true), RD_##B(c, u->reg));                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_eg_##B##_f)                                                                    \
    {                                                                                             \
        FAST_WRITE(B, op_mov_eg_##B##_m, p);                                                      \
        *p = RD_##B(c, u->reg);                                                                   \
        STORED_NEXT(B, p);                                                                        \
    }                                                                                             \
    HANDLER(op_mov_ge_##B##_r)                                                                    \
    {                                                                                             \
        WR_##B(c, u->reg, RD_##B(c, u->rm));                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_ge_##B##_m)                                                                    \
    {                                                                                             \
        WR_##B(c, u->reg, mem_read##B(c, u, ea_linear(c, u, B / 8, false)));                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_ge_##B##_f)                                                                    \
    {                                                                                             \
        FAST_READ(B, op_mov_ge_##B##_m, p);                                                       \
        WR_##B(c, u->reg, *p);                                                                    \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_ei_##B##_r)                                                                    \
    {                                                                                             \
        WR_##B(c, u->rm, u->imm);                                                                 \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_ei_##B##_m)                                                                    \
    {                                                                                             \
        mem_write##B(c, u, ea_linear(c, u, B / 8, true), (U(B))u->imm);                           \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_ei_##B##_f)                                                                    \
    {                                                                                             \
        FAST_WRITE(B, op_mov_ei_##B##_m, p);                                                      \
        *p = (U(B))u->imm;                                                                        \
        STORED_NEXT(B, p);                                                                        \
    }                                                                                             \
    HANDLER(op_mov_load_moffs_##B)                                                                \
    {                                                                                             \
        WR_##B(c, RAX, mem_read##B(c, u, seg_linear(c, u, u->seg, u->imm, B / 8, false)));        \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_mov_store_moffs_##B)                                                               \
    {                                                                                             \
        mem_write##B(c, u, seg_linear(c, u, u->seg, u->imm, B / 8, true), RD_##B(c, RAX));        \
        NEXT(c, u);                                                                               \
    }

SIZES(MOVES, )

/* FROM: bits of the source */
#define EXTENDS(B, name, FROM, TYPE)                                                              \
    HANDLER(op_##name##_##B##_r)                                                                  \
    {                                                                                             \
        WR_##B(c, u->reg, (TYPE)RD_##FROM(c, u->rm));                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##name##_##B##_m)                                                                  \
    {                                                                                             \
        WR_##B(c, u->reg, (TYPE)mem_read##FROM(c, u, ea_linear(c, u, FROM / 8, false)));          \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##name##_##B##_f)                                                                  \
    {                                                                                             \
        FAST_READ(FROM, op_##name##_##B##_m, p);                                                  \
        WR_##B(c, u->reg, (TYPE)*p);                                                              \
        NEXT(c, u);                                                                               \
    }

SIZES_V(EXTENDS, movzx8, 8, uint8_t)
SIZES_V(EXTENDS, movzx16, 16, uint16_t)
SIZES_V(EXTENDS, movsx8, 8, int8_t)
SIZES_V(EXTENDS, movsx16, 16, int16_t)
EXTENDS(32, movsxd, 32, int32_t)
EXTENDS(64, movsxd, 32, int32_t)
EXTENDS(16, movsxd, 16, int16_t) /* with 66: reads 16 bits, SDM vol. 2, MOVSXD */

#define LEA(B, ...)                                                                               \
    HANDLER(op_lea_##B##_m)                                                                       \
    {                                                                                             \
        WR_##B(c, u->reg, ea_offset(c, u));                                                       \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_lea_##B##_f)                                                                       \
    {                                                                                             \
        WR_##B(c, u->reg, ea64(c, u));                                                            \
        NEXT(c, u);                                                                               \
    }

SIZES_V(LEA, )

/* ---- exchange: always locked on memory ---- */
#define EXCHANGES(B, ...)                                                                         \
    HANDLER(op_xchg_##B##_r)                                                                      \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg);                                         \
        WR_##B(c, u->rm, b);                                                                      \
        WR_##B(c, u->reg, a);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_xchg_##B##_m)                                                                      \
    {                                                                                             \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 1, b);                                                                      \
        WR_##B(c, u->reg, a);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_xchg_##B##_l) { return op_xchg_##B##_m(c, u); }                                    \
    HANDLER(op_xadd_##B##_r)                                                                      \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg), r = (U(B))(a + b);                      \
        lazy_set(c, LAZY(LAZY_ADD, LOG2_##B), a, b, r);                                           \
        WR_##B(c, u->reg, a);                                                                     \
        WR_##B(c, u->rm, r);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_xadd_##B##_m)                                                                      \
    {                                                                                             \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 0, a + b);                                                                  \
        lazy_set(c, LAZY(LAZY_ADD, LOG2_##B), a, b, (U(B))(a + b));                               \
        WR_##B(c, u->reg, a);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_xadd_##B##_l)                                                                      \
    {                                                                                             \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 1, a + b);                                                                  \
        lazy_set(c, LAZY(LAZY_ADD, LOG2_##B), a, b, (U(B))(a + b));                               \
        WR_##B(c, u->reg, a);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_cmpxchg_##B##_r)                                                                   \
    {                                                                                             \
        U(B) a = RD_##B(c, RAX), old = RD_##B(c, u->rm), r = (U(B))(a - old);                     \
        lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), a, old, r);                                         \
        if (r == 0) {                                                                             \
            WR_##B(c, u->rm, RD_##B(c, u->reg));                                                  \
        } else {                                                                                  \
            WR_##B(c, RAX, old);                                                                  \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    /* memory is written either way: the old value where the comparison failed */                 \
    HANDLER(op_cmpxchg_##B##_m)                                                                   \
    {                                                                                             \
        U(B) expected = RD_##B(c, RAX), b = RD_##B(c, u->reg);                                    \
        RMW_MEMORY(B, 0, a == expected ? b : a);                                                  \
        lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), expected, a, (U(B))(expected - a));                 \
        if (a != expected) {                                                                      \
            WR_##B(c, RAX, a);                                                                    \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_cmpxchg_##B##_l)                                                                   \
    {                                                                                             \
        U(B) expected = RD_##B(c, RAX), b = RD_##B(c, u->reg);                                    \
        RMW_MEMORY(B, 1, a == expected ? b : a);                                                  \
        lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), expected, a, (U(B))(expected - a));                 \
        if (a != expected) {                                                                      \
            WR_##B(c, RAX, a);                                                                    \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

SIZES(EXCHANGES, )

#define EXCHANGE_AX(B, ...)                                                                       \
    HANDLER(op_xchg_ax_##B)                                                                       \
    {                                                                                             \
        if (u->rm != RAX) { /* 90 is NOP, which does not clear the upper half of RAX */           \
            U(B) a = RD_##B(c, RAX), b = RD_##B(c, u->rm);                                        \
            WR_##B(c, RAX, b);                                                                    \
            WR_##B(c, u->rm, a);                                                                  \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }

SIZES_V(EXCHANGE_AX, )

/* ---- CMPXCHG8B and 16B ---- */
static bool cmpxchg8b(struct cpu *c, const struct uop *u, bool locked)
{
    uint64_t expected = (uint64_t)RD_32(c, RDX) << 32 | RD_32(c, RAX), desired = (uint64_t)RD_32(c, RCX) << 32 | RD_32(c, RBX);
    uint64_t old;
    if (locked) {
        RMW_MEMORY(64, 1, a == expected ? desired : a);
        old = a;
    } else {
        RMW_MEMORY(64, 0, a == expected ? desired : a);
        old = a;
    }
    if (old != expected) {
        GPR(c, RAX) = (uint32_t)old;
        GPR(c, RDX) = old >> 32;
    }
    return old == expected;
}

HANDLER(op_cmpxchg8b_m)
{
    bool equal = cmpxchg8b(c, u, false);
    flags_set_some(c, FLAG_ZF, equal ? FLAG_ZF : 0);
    NEXT(c, u);
}

HANDLER(op_cmpxchg8b_l)
{
    bool equal = cmpxchg8b(c, u, true);
    flags_set_some(c, FLAG_ZF, equal ? FLAG_ZF : 0);
    NEXT(c, u);
}

/* 16 aligned bytes lie within a page, so the only operands without a host address are MMIO and ROM */
static bool cmpxchg16b(struct cpu *c, const struct uop *u)
{
    uint64_t lin = ea_linear(c, u, 16, true);
    if (lin & 15) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    uint64_t expected_low = GPR(c, RAX), expected_high = GPR(c, RDX), low = expected_low, high = expected_high;
    uint8_t equal;
    void *p = mem_rmw(c, u, lin, 16);
    if (p) {
        __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(equal), "+m"(*(uint64_t(*)[2])p), "+a"(low), "+d"(high)
                         : "b"(GPR(c, RBX)), "c"(GPR(c, RCX)) : "memory");
        code_check(c, p, 16);
    } else {
        low = mem_read_slow(c, u, lin, 8);
        high = mem_read_slow(c, u, lin + 8, 8);
        equal = low == expected_low && high == expected_high;
        mem_write_slow(c, u, lin, equal ? GPR(c, RBX) : low, 8);
        mem_write_slow(c, u, lin + 8, equal ? GPR(c, RCX) : high, 8);
    }
    GPR(c, RAX) = low;
    GPR(c, RDX) = high;
    return equal;
}

HANDLER(op_cmpxchg16b_m)
{
    bool equal = cmpxchg16b(c, u);
    flags_set_some(c, FLAG_ZF, equal ? FLAG_ZF : 0);
    NEXT(c, u);
}

HANDLER(op_cmpxchg16b_l) { return op_cmpxchg16b_m(c, u); }

/* ---- conditional: the memory operand is read whatever the condition; a 32-bit destination loses its upper half too ---- */
#define CONDITIONS(M, ...)                                                                                    \
    M(o, 0, __VA_ARGS__) M(no, 1, __VA_ARGS__) M(b, 2, __VA_ARGS__) M(nb, 3, __VA_ARGS__)                     \
    M(z, 4, __VA_ARGS__) M(nz, 5, __VA_ARGS__) M(be, 6, __VA_ARGS__) M(nbe, 7, __VA_ARGS__)                   \
    M(s, 8, __VA_ARGS__) M(ns, 9, __VA_ARGS__) M(p, 10, __VA_ARGS__) M(np, 11, __VA_ARGS__)                   \
    M(l, 12, __VA_ARGS__) M(nl, 13, __VA_ARGS__) M(le, 14, __VA_ARGS__) M(nle, 15, __VA_ARGS__)

#define CMOV(B, cc, number)                                                                       \
    HANDLER(op_cmov_##cc##_##B##_r)                                                               \
    {                                                                                             \
        U(B) v = flags_cond(c, number) ? RD_##B(c, u->rm) : RD_##B(c, u->reg);                    \
        WR_##B(c, u->reg, v);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_cmov_##cc##_##B##_m)                                                               \
    {                                                                                             \
        U(B) v = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                                \
        if (!flags_cond(c, number)) {                                                             \
            v = RD_##B(c, u->reg);                                                                \
        }                                                                                         \
        WR_##B(c, u->reg, v);                                                                     \
        NEXT(c, u);                                                                               \
    }

#define CONDITIONAL(cc, number, ...)                                                              \
    CMOV(16, cc, number)                                                                          \
    CMOV(32, cc, number)                                                                          \
    CMOV(64, cc, number)                                                                          \
    HANDLER(op_set_##cc##_r)                                                                      \
    {                                                                                             \
        REG8(c, u->rm) = flags_cond(c, number);                                                   \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_set_##cc##_m)                                                                      \
    {                                                                                             \
        mem_write8(c, u, ea_linear(c, u, 1, true), flags_cond(c, number));                        \
        NEXT(c, u);                                                                               \
    }

CONDITIONS(CONDITIONAL, )

/* ---- the rest ---- */
HANDLER(op_xlat)
{
    uint64_t ea = GPR(c, RBX) + REG8(c, 0);
    ea = u->mode & UOP_ASZ32 ? (uint32_t)ea : u->mode & UOP_ASZ16 ? (uint16_t)ea : ea;
    REG8(c, 0) = mem_read8(c, u, seg_linear(c, u, u->seg, ea, 1, false));
    NEXT(c, u);
}

HANDLER(op_cbw_16) { WR_16(c, RAX, (int8_t)GPR(c, RAX)); NEXT(c, u); }
HANDLER(op_cbw_32) { WR_32(c, RAX, (int16_t)GPR(c, RAX)); NEXT(c, u); }
HANDLER(op_cbw_64) { WR_64(c, RAX, (int32_t)GPR(c, RAX)); NEXT(c, u); }

HANDLER(op_cwd)
{
    if (u->mode & UOP_OSZ64) {
        GPR(c, RDX) = (uint64_t)((int64_t)GPR(c, RAX) >> 63);
    } else if (u->mode & UOP_OSZ16) {
        REG16(c, RDX) = (uint16_t)((int16_t)GPR(c, RAX) >> 15);
    } else {
        GPR(c, RDX) = (uint32_t)((int32_t)GPR(c, RAX) >> 31);
    }
    NEXT(c, u);
}

HANDLER(op_movnti)
{
    if (u->mode & UOP_OSZ64) {
        mem_write64(c, u, ea_linear(c, u, 8, true), GPR(c, u->reg));
    } else {
        mem_write32(c, u, ea_linear(c, u, 4, true), RD_32(c, u->reg));
    }
    NEXT(c, u);
}

#define BYTE_SWAPS(B, ...)                                                                        \
    HANDLER(op_movbe_load_##B)                                                                    \
    {                                                                                             \
        WR_##B(c, u->reg, __builtin_bswap##B(mem_read##B(c, u, ea_linear(c, u, B / 8, false))));  \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_movbe_store_##B)                                                                   \
    {                                                                                             \
        mem_write##B(c, u, ea_linear(c, u, B / 8, true), __builtin_bswap##B(RD_##B(c, u->reg)));  \
        NEXT(c, u);                                                                               \
    }

SIZES_V(BYTE_SWAPS, )

HANDLER(op_bswap_16) { REG16(c, u->rm) = 0; NEXT(c, u); } /* undefined; what hardware does */
HANDLER(op_bswap_32) { GPR(c, u->rm) = __builtin_bswap32(RD_32(c, u->rm)); NEXT(c, u); }
HANDLER(op_bswap_64) { GPR(c, u->rm) = __builtin_bswap64(GPR(c, u->rm)); NEXT(c, u); }

HANDLER(op_nop) { NEXT(c, u); }
HANDLER(op_ud) { raise_fault(c, u, VEC_UD); }
HANDLER(op_mfence) { atomic_thread_fence(memory_order_seq_cst); NEXT(c, u); }
