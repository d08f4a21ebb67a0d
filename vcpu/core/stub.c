/*
 * Host stubs: where they live, how a form finds its own, and the host trap that an unmasked guest exception makes.
 *
 * The memory is mapped twice, writable here and executable there, so no page is ever both. Stubs are found by a key of
 * everything that is built into the code, 64 bits mixed from a random seed: blocks that are translated again, or in
 * several places, share theirs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <ucontext.h>
#include <unistd.h>

#include "decode.h"
#include "host.h"
#include "mem.h"

#define POOL_BYTES (4u << 20)
#define SLOTS (1u << 16)         /* open addressing; at most half are used */
#define POOL_LAST (POOL_BYTES - STUB_MAX) /* kept for stubs made after the rest is used up */
#define ALIGN 16u

void op_host(struct cpu *c, const struct uop *u);

static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static struct host_stubs *_Atomic pools;
static struct sigaction previous_action;

const char *host_lacks(void)
{
    __builtin_cpu_init();
    return !__builtin_cpu_supports("sse4.2") ? "the host CPU lacks SSE4.2" : !__builtin_cpu_supports("aes") ? "the host CPU lacks AES"
        : !__builtin_cpu_supports("pclmul") ? "the host CPU lacks PCLMULQDQ" : NULL;
}

static _Noreturn void trap_mf(struct cpu *c, const struct uop *u) { raise_mf(c, u); }

static _Noreturn void trap_xm(struct cpu *c, const struct uop *u)
{
    raise_fault(c, u, ARCH(c)->cr4 & 0x400 /* OSXMMEXCPT */ ? VEC_XM : VEC_UD);
}

/*
 * An unmasked exception in a stub: goes on in trap_*(c, u), for which rdi, rsi and the stack are right (emit.c);
 * the host has committed nothing, and the FPU state in the frame is what the guest's handler shall see.
 */
static void on_sigfpe(int number, siginfo_t *info, void *context)
{
    ucontext_t *frame = context;
    uintptr_t at = (uintptr_t)frame->uc_mcontext.gregs[REG_RIP];
    for (const struct host_stubs *pool = atomic_load(&pools); pool; pool = pool->next) {
        if (at - (uintptr_t)pool->executable < POOL_BYTES) {
            bool x87 = frame->uc_mcontext.gregs[REG_TRAPNO] == VEC_MF;
            frame->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)(x87 ? trap_mf : trap_xm);
            return;
        }
    }
    if (previous_action.sa_flags & SA_SIGINFO) {
        previous_action.sa_sigaction(number, info, context);
    } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
        previous_action.sa_handler(number);
    } else {
        signal(SIGFPE, SIG_DFL); /* the instruction traps again and ends the process */
    }
}

bool host_init(struct cpu *c)
{
    struct host_stubs *pool = mmap(NULL, sizeof *pool + SLOTS * sizeof(struct stub_slot), PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int memory = memfd_create("atoll-stubs", MFD_CLOEXEC);
    if (pool == MAP_FAILED || memory < 0 || ftruncate(memory, POOL_BYTES) < 0) {
        return false;
    }
    pool->writable = mmap(NULL, POOL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    pool->executable = mmap(NULL, POOL_BYTES, PROT_READ | PROT_EXEC, MAP_SHARED, memory, 0);
    int reason = errno;
    close(memory);
    errno = reason;
    if (pool->writable == MAP_FAILED || pool->executable == MAP_FAILED) {
        return false;
    }
    if (getrandom(&pool->seed, sizeof pool->seed, 0) != sizeof pool->seed) {
        return false;
    }
    pthread_mutex_lock(&pools_lock);
    if (!atomic_load(&pools)) {
        struct sigaction action = {.sa_sigaction = on_sigfpe, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigaction(SIGFPE, &action, &previous_action);
    }
    pool->next = atomic_load(&pools);
    atomic_store(&pools, pool);
    pthread_mutex_unlock(&pools_lock);
    c->stubs = pool;
    return true;
}

void host_free(struct cpu *c)
{
    struct host_stubs *pool = c->stubs;
    if (!pool) {
        return;
    }
    pthread_mutex_lock(&pools_lock);
    if (atomic_load(&pools) == pool) {
        atomic_store(&pools, pool->next);
    }
    for (struct host_stubs *other = atomic_load(&pools); other; other = other->next) {
        if (other->next == pool) {
            other->next = pool->next;
        }
    }
    if (!atomic_load(&pools)) {
        sigaction(SIGFPE, &previous_action, NULL);
    }
    pthread_mutex_unlock(&pools_lock);
    munmap(pool->writable, POOL_BYTES);
    munmap(pool->executable, POOL_BYTES);
    munmap(pool, sizeof *pool + SLOTS * sizeof(struct stub_slot));
    c->stubs = NULL;
}

bool host_full(const struct cpu *c) { return c->stubs->used + STUB_MAX > POOL_LAST || c->stubs->count >= SLOTS / 2; }

/* The CPU may have decoded ahead at addresses that get new code: SDM vol. 3 section 9.1.3 asks for a serializing instruction. */
static void serialize(void)
{
    uint32_t a = 0, b, d, leaf = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(leaf), "=d"(d) : : "memory");
}

void host_reset(struct cpu *c)
{
    c->stubs->used = c->stubs->count = 0;
    memset(c->stubs->slot, 0, SLOTS * sizeof(struct stub_slot));
    serialize();
}

/* ModRM.rm of a 16-bit address: SDM vol. 2 table 2-1 */
static unsigned rm16(const struct uop *u)
{
    unsigned single = u->base == RSI ? 4 : u->base == RDI ? 5 : u->base == RBX ? 7 : 6;
    return u->index == R_ZERO ? single : (u->base == RBP ? 2 : 0) | (u->index == RDI ? 1 : 0);
}

/* FOP: low bits of the opcode and ModRM (SDM vol. 1 section 8.1.9), whose mod is taken to be the shortest form. */
static uint16_t x87_fop(const struct host_row *row, const struct uop *u)
{
    unsigned reg = row->ext & 7, mod = 3, rm = u->rm & 7;
    if (uop_mem(u)) {
        bool no_base = u->base >= R_ZERO;
        mod = no_base || u->disp == 0 ? 0 : u->disp >= -128 && u->disp <= 127 ? 1 : 2;
        rm = u->mode & UOP_ASZ16 ? rm16(u) : u->index != R_ZERO ? 4 : no_base ? 5 : u->base & 7;
    }
    return (uint16_t)((row->opcode & 7) << 8 | mod << 6 | reg << 3 | rm);
}

static bool is_host(const struct host_stubs *pool, const struct uop *u)
{
    return u->fn == op_host || (uintptr_t)u->fn - (uintptr_t)pool->executable < POOL_BYTES;
}

/* The gate that earlier instructions of the block have passed: blocks are entered at their head alone, and what changes CR0 or
 * CR4 ends them. */
static uint8_t gate_passed(const struct cpu *c, const struct uop *u)
{
    uint8_t passed = GATE_NONE;
    for (const struct uop *earlier = c->block->u; earlier < u; earlier++) {
        if (is_host(c->stubs, earlier)) {
            uint8_t gate = host_rows[earlier->aux].gate;
            passed = gate != GATE_WAIT && gate > passed ? gate : passed;
        }
    }
    return passed;
}

static uint64_t mix(uint64_t key, uint64_t value)
{
    key = (key ^ value) * 0x9e3779b97f4a7c15;
    return key ^ key >> 29;
}

/* u and the host rows that follow it. Returns the key of all that will be in the code. */
static uint64_t take_run(const struct cpu *c, const struct uop *u, unsigned most, struct stub_run *run)
{
    const struct uop *end = c->block->u + c->block->uops;
    uint64_t key = c->stubs->seed;
    run->mode64 = c->mode & MODE_64;
    run->flat = c->mode & MODE_FLAT;
    run->passed = gate_passed(c, u);
    run->count = 0;
    do {
        struct stub_form *f = &run->form[run->count++];
        *f = (struct stub_form){.row = &host_rows[u->aux], .u = *u};
        f->fop = f->row->bits & HOSTF_POINTERS ? x87_fop(f->row, u) : 0;
        uint64_t imm = f->row->bits & HOSTF_IMM ? u->imm & 0xff : 0;
        key = mix(key, u->aux | (uint64_t)u->reg << 16 | (uint64_t)u->rm << 24 | (uint64_t)u->base << 32 | (uint64_t)u->index << 40
                           | (uint64_t)u->scale << 48 | (uint64_t)u->mode << 56);
        key = mix(key, (uint32_t)u->disp | (uint64_t)u->seg << 32 | imm << 40);
        u++;
    } while (run->count < most && u < end && is_host(c->stubs, u));
    return mix(key, run->mode64 | run->flat << 1 | run->passed << 2 | run->count << 8) | 1;
}

static uop_fn stub_for(struct cpu *c, const struct uop *u)
{
    struct host_stubs *pool = c->stubs;
    struct stub_run run;
    bool last = host_full(c);
    uint64_t key = take_run(c, u, last ? 1 : RUN_MAX, &run);
    struct stub_slot *slot = &pool->slot[key >> 48];
    while (slot->key && slot->key != key) {
        slot = slot == &pool->slot[SLOTS - 1] ? pool->slot : slot + 1;
    }
    if (!slot->key) {
        uint32_t at = last ? POOL_LAST : pool->used;
        unsigned n = emit_stub(&run, pool->writable + at);
        if (last) { /* good for one use: not entered, and not bound */
            serialize();
            return (uop_fn)(uintptr_t)(pool->executable + at);
        }
        pool->used += (n + ALIGN - 1) & ~(ALIGN - 1);
        pool->count++;
        *slot = (struct stub_slot){key, at};
    }
    uop_fn fn = (uop_fn)(uintptr_t)(pool->executable + slot->offset);
    ((struct uop *)u)->fn = fn;
    return fn;
}

/* A host row that is executed for the first time here */
void op_host(struct cpu *c, const struct uop *u)
{
    uop_fn fn = stub_for(c, u);
    return fn(c, u);
}
