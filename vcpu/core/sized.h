/* For handlers that exist in the four operand sizes: registers, memory and types by the number of bits. */
#ifndef ATOLL_SIZED_H
#define ATOLL_SIZED_H

#include "cpu.h"
#include "ea.h"
#include "flags.h"
#include "mem.h"

/* M(bits, ...) for each size */
#define SIZES(M, ...) M(8, __VA_ARGS__) M(16, __VA_ARGS__) M(32, __VA_ARGS__) M(64, __VA_ARGS__)
#define SIZES_V(M, ...) M(16, __VA_ARGS__) M(32, __VA_ARGS__) M(64, __VA_ARGS__)

#define U(B) uint##B##_t
#define S(B) int##B##_t

#define RD_8(c, i) REG8(c, i)
#define RD_16(c, i) REG16(c, i)
#define RD_32(c, i) ((uint32_t)GPR(c, i))
#define RD_64(c, i) GPR(c, i)
#define WR_8(c, i, v) ((void)(REG8(c, i) = (uint8_t)(v)))
#define WR_16(c, i, v) ((void)(REG16(c, i) = (uint16_t)(v)))
#define WR_32(c, i, v) ((void)(GPR(c, i) = (uint32_t)(v)))
#define WR_64(c, i, v) ((void)(GPR(c, i) = (uint64_t)(v)))

#define HANDLER(name) void name(struct cpu *c, const struct uop *u)

/* Fast memory forms: 64-bit mode, no segment base. On a TLB miss the general form takes over; it must have been declared. */
#define FAST_READ(B, general, p)                                                                  \
    uint64_t lin_ = ea64(c, u);                                                                   \
    const struct tlb_entry *e_ = tlb_slot(c, lin_);                                               \
    if (unlikely(!tlb_reads(e_, lin_, (B) / 8))) {                                                \
        return general(c, u);                                                                     \
    }                                                                                             \
    volatile any##B *p = (volatile any##B *)(lin_ + e_->addend)

#define FAST_WRITE(B, general, p)                                                                 \
    uint64_t lin_ = ea64(c, u);                                                                   \
    const struct tlb_entry *e_ = tlb_slot(c, lin_);                                               \
    if (unlikely(!tlb_writes(e_, lin_, (B) / 8))) {                                               \
        return general(c, u);                                                                     \
    }                                                                                             \
    volatile any##B *p = (volatile any##B *)(lin_ + e_->addend)

/* code_check() and NEXT(), with the rare call kept out of the handler (block.c) */
void stored_into_code(struct cpu *c, const struct uop *u, uint64_t offset, unsigned n);
#define STORED_NEXT(B, p)                                                                         \
    do {                                                                                          \
        atomic_signal_fence(memory_order_seq_cst);                                                \
        uint64_t offset_ = (uint64_t)((const uint8_t *)(p) - c->guest);                           \
        if (unlikely(((volatile uint64_t *)c->code_mask)[offset_ >> 12])) {                       \
            return stored_into_code(c, u, offset_, (B) / 8);                                      \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    } while (0)

/* The world stands while a LOCKed operand has no single host address; the operand has been probed. (io.h) */
void world_stop(struct cpu *c);
void world_resume(struct cpu *c);

/*
 * Body of a read-modify-write on memory, any mode. COMPUTE: expression of `a` (operand before) for the result, without
 * effects. LOCKED: 1 with LOCK prefix. Then `a` is the old value, all faults have passed and nothing else is committed.
 */
#define RMW_MEMORY(B, LOCKED, COMPUTE) RMW_MEMORY_AT(B, LOCKED, ea_linear(c, u, (B) / 8, true), COMPUTE)
#define RMW_MEMORY_AT(B, LOCKED, LINEAR, COMPUTE)                                                 \
    U(B) a;                                                                                       \
    do {                                                                                          \
        uint64_t lin_ = (LINEAR);                                                                 \
        any##B *p_ = mem_rmw(c, u, lin_, (B) / 8);                                                \
        if (likely(p_ != NULL)) {                                                                 \
            if (LOCKED) {                                                                         \
                U(B) seen_ = *(volatile any##B *)p_;                                              \
                do {                                                                              \
                    a = seen_;                                                                    \
                    seen_ = __sync_val_compare_and_swap(p_, a, (U(B))(COMPUTE));                  \
                } while (unlikely(seen_ != a));                                                   \
            } else {                                                                              \
                a = *(volatile any##B *)p_;                                                       \
                *(volatile any##B *)p_ = (U(B))(COMPUTE);                                         \
            }                                                                                     \
            code_check(c, p_, (B) / 8);                                                           \
        } else {                                                                                  \
            if (LOCKED) {                                                                         \
                world_stop(c);                                                                    \
            }                                                                                     \
            a = (U(B))mem_read_slow(c, u, lin_, (B) / 8);                                         \
            mem_write_slow(c, u, lin_, (U(B))(COMPUTE), (B) / 8);                                 \
            if (LOCKED) {                                                                         \
                world_resume(c);                                                                  \
            }                                                                                     \
        }                                                                                         \
    } while (0)

#endif
