/*
 * One instruction on the host's CPU, from a given state to the state behind it: the oracle of the x87 and SSE tests.
 * Only RSP is not the caller's. Memory operands lie in the caller's mapping.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

struct native_state {
    uint64_t gpr[16], rflags, unused[15];
    uint8_t fx[512];             /* FXSAVE image, 64-byte aligned */
};

struct frame {                   /* at a fixed distance from the code */
    struct native_state s;
    uint64_t rsp;
    uint32_t mxcsr_default;
};

#define CODE_BYTES 4096
static uint8_t *area;
static sigjmp_buf back;
static volatile int trap;

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    __asm__ volatile("push $2; popfq" : : : "cc"); /* AC may be set */
    trap = (int)((ucontext_t *)context)->uc_mcontext.gregs[REG_TRAPNO];
    siglongjmp(back, 1);
}

static uint8_t *put(uint8_t *to, const void *bytes, unsigned n) { return (uint8_t *)memcpy(to, bytes, n) + n; }

/* opcode bytes with a rip-relative operand; nothing follows the displacement */
static uint8_t *put_relative(uint8_t *to, const void *bytes, unsigned n, const void *target)
{
    to = put(to, bytes, n);
    int32_t distance = (int32_t)((const uint8_t *)target - (to + 4));
    return put(to, &distance, 4);
}

static uint8_t *put_moves(uint8_t *to, struct frame *f, uint8_t opcode)
{
    for (unsigned r = 0; r < 16; r++) {
        if (r != 4) {
            to = put_relative(to, (uint8_t[]){r > 7 ? 0x4c : 0x48, opcode, (uint8_t)(5 | (r & 7) << 3)}, 3, &f->s.gpr[r]);
        }
    }
    return to;
}

static void build(const uint8_t *bytes, unsigned n, struct frame *f)
{
    static const uint8_t push[] = {0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57};
    static const uint8_t pop[] = {0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3};
    uint8_t *at = put(area, push, sizeof push);
    at = put_relative(at, "\x48\x0f\xae\x0d", 4, f->s.fx);          /* fxrstor64 */
    at = put_relative(at, "\xff\x35", 2, &f->s.rflags);             /* push; popfq */
    at = put(at, "\x9d", 1);
    at = put_moves(at, f, 0x8b);
    at = put(at, bytes, n);
    at = put_moves(at, f, 0x89);
    at = put(at, "\x9c", 1);
    at = put_relative(at, "\x8f\x05", 2, &f->s.rflags);
    at = put_relative(at, "\x48\x0f\xae\x05", 4, f->s.fx);          /* fxsave64 */
    at = put(at, "\xdb\xe3", 2);                                    /* fninit */
    at = put_relative(at, "\x0f\xae\x15", 3, &f->mxcsr_default);    /* ldmxcsr */
    at = put(at, "\x6a\x02\x9d", 3);                              /* push 2; popfq: AC and DF */
    put(at, pop, sizeof pop);
}

/* 0, or the number of the exception that the instruction raised (then *state is as it was) */
int native_run(struct native_state *state, const uint8_t *bytes, unsigned n)
{
    static const int signals[] = {SIGFPE, SIGSEGV, SIGILL, SIGBUS, SIGTRAP};
    static uint8_t stack[65536];
    static uint8_t clean[512] __attribute__((aligned(64)));
    struct sigaction old[5], action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack}, old_stack;
    if (!area) {
        area = mmap(NULL, 2 * CODE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (area == MAP_FAILED) {
            return -1;
        }
        __asm__ volatile("fxsave64 %0" : "=m"(clean));
    }
    struct frame *f = (struct frame *)(area + CODE_BYTES);
    f->s = *state;
    f->mxcsr_default = 0x1f80;
    build(bytes, n, f);
    sigaltstack(&alternate, &old_stack);
    for (unsigned i = 0; i < 5; i++) {
        sigaction(signals[i], &action, &old[i]);
    }
    trap = 0;
    if (!sigsetjmp(back, 1)) {
        ((void (*)(void))(uintptr_t)area)();
        *state = f->s;
    } else {
        __asm__ volatile("fxrstor64 %0" : : "m"(clean));
    }
    for (unsigned i = 0; i < 5; i++) {
        sigaction(signals[i], &old[i], NULL);
    }
    sigaltstack(&old_stack, NULL);
    return trap;
}
