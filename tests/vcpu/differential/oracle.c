/*
 * The host's CPU as oracle: runs the cases of a shared file, each from a given state until its first exception.
 *
 * A signal handler does it all: what it finds in the signal's context is the state behind a case, what it puts there
 * is the state in front of the next one, and returning from it starts that one. The code pages are filled with INT3,
 * so every case ends in an exception.
 *
 * usage: oracle FILE CASES. On stdout HOST_* bits; then for each 4-byte count on stdin the first so many cases are run,
 * and the count comes back.
 */
#define _GNU_SOURCE
#include "oracle.h"

#include <asm/ldt.h>
#include <asm/prctl.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define PATIENCE 10                /* seconds for one batch */
#define FX_IMAGE 416               /* bytes of the FXSAVE image that are state; behind them the kernel keeps notes */

static struct test_case *cases;
static uint8_t *code = (uint8_t *)CODE_LINEAR, *data = (uint8_t *)DATA_LINEAR;
static uint8_t background[DATA_SIZE];
static int index_, count;
static greg_t home[NGREG];
static uint8_t home_fx[FX_IMAGE];
static uint64_t home_fs;

static const uint8_t order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void segment_base(int which, uint64_t value)
{
    syscall(SYS_arch_prctl, which, value);
}

static void load_selectors(uint16_t ds, uint16_t es, uint16_t fs, uint16_t gs)
{
    __asm__ volatile("mov %w0, %%ds; mov %w1, %%es; mov %w2, %%fs; mov %w3, %%gs" : : "r"(ds), "r"(es), "r"(fs), "r"(gs));
}

static void take_result(struct test_case *t, ucontext_t *uc)
{
    greg_t *g = uc->uc_mcontext.gregs;
    struct state *s = &t->after;
    for (int i = 0; i < 16; i++) {
        s->gpr[i] = (uint64_t)g[order[i]];
    }
    s->rip = (uint64_t)g[REG_RIP];
    s->rflags = (uint64_t)g[REG_EFL];
    s->cs = (uint16_t)g[REG_CSGSFS];
    s->ss = (uint16_t)(g[REG_CSGSFS] >> 48);
    __asm__ volatile("mov %%ds, %0; mov %%es, %1; mov %%fs, %2; mov %%gs, %3" : "=r"(s->ds), "=r"(s->es), "=r"(s->fs), "=r"(s->gs));
    syscall(SYS_arch_prctl, ARCH_GET_FS, &s->fs_base);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &s->gs_base);
    memcpy(s->fx, uc->uc_mcontext.fpregs, FX_IMAGE);
    t->vector = (uint32_t)g[REG_TRAPNO];
    t->error = (uint32_t)g[REG_ERR];
    t->cr2 = (uint64_t)g[REG_CR2];
    memcpy(t->data, data, DATA_SIZE);
    memset(code + t->code_at, 0xcc, t->code_size);
}

static void start(struct test_case *t, ucontext_t *uc)
{
    greg_t *g = uc->uc_mcontext.gregs;
    const struct state *s = &t->before;
    memcpy(data, background, READONLY);
    memcpy(data + READONLY + 4096, background + READONLY + 4096, DATA_SIZE - READONLY - 4096);
    for (int i = 0; i < PATCHES; i++) {
        if (t->patch[i].size) {
            memcpy(data + t->patch[i].at, t->patch[i].bytes, t->patch[i].size);
        }
    }
    memcpy(code + t->code_at, t->code, t->code_size);
    for (int i = 0; i < 16; i++) {
        g[order[i]] = (greg_t)s->gpr[i];
    }
    g[REG_RIP] = (greg_t)s->rip;
    g[REG_EFL] = (greg_t)s->rflags;
    g[REG_CSGSFS] = (greg_t)(s->cs | (uint64_t)s->ss << 48);
    uint8_t *fx = (uint8_t *)uc->uc_mcontext.fpregs;
    memcpy(fx, s->fx, FX_IMAGE);
    if (*(uint32_t *)(fx + 464) == 0x46505853) { /* FP_XSTATE_MAGIC1: an XSAVE header follows; x87 and SSE are not initial */
        *(uint64_t *)(fx + 512) |= 3;
    }
    load_selectors(s->ds, s->es, s->fs, s->gs);
    segment_base(ARCH_SET_FS, s->fs_base);
    segment_base(ARCH_SET_GS, s->gs_base);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
    __asm__ volatile("pushfq; andl $~0x244000, (%%rsp); popfq" : : : "memory", "cc"); /* AC NT ID: no one else does */
    (void)info;
    ucontext_t *uc = context;
    if (index_ < 0) {
        memcpy(home, uc->uc_mcontext.gregs, sizeof home);
        memcpy(home_fx, uc->uc_mcontext.fpregs, FX_IMAGE);
        syscall(SYS_arch_prctl, ARCH_GET_FS, &home_fs);
    } else {
        take_result(&cases[index_], uc);
        if (number == SIGALRM) {
            cases[index_].vector = ENDLESS;
            alarm(PATIENCE);
        }
    }
    if (++index_ < count) {
        start(&cases[index_], uc);
    } else {
        memcpy(uc->uc_mcontext.gregs, home, sizeof home);
        memcpy(uc->uc_mcontext.fpregs, home_fx, FX_IMAGE);
        segment_base(ARCH_SET_FS, home_fs);
    }
}

static void *map(uint64_t at, size_t size, int protection)
{
    void *p = mmap((void *)at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (p != (void *)at) {
        perror("mmap");
        exit(1);
    }
    return p;
}

/* A 16-bit segment in the LDT; 0: it is there */
static long descriptor(unsigned entry, unsigned base, unsigned limit, bool executable)
{
    struct user_desc d = {.entry_number = entry, .base_addr = base, .limit = limit, .useable = 1,
                          .contents = executable ? MODIFY_LDT_CONTENTS_CODE : MODIFY_LDT_CONTENTS_DATA};
    return syscall(SYS_modify_ldt, 1, &d, sizeof d);
}

int main(int argc, char **argv)
{
    static uint8_t stack[1 << 18] __attribute__((aligned(64)));
    static const int signals[] = {SIGFPE, SIGSEGV, SIGILL, SIGBUS, SIGTRAP, SIGALRM};
    if (argc != 3) {
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    size_t size = strtoul(argv[2], NULL, 0) * sizeof *cases;
    int fd = open(argv[1], O_RDWR);
    cases = fd < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (cases == MAP_FAILED) {
        perror(argv[1]);
        return 1;
    }
    map(CODE_LINEAR, CODE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC);
    memset(code, 0xcc, CODE_SIZE);
    map(DATA_LINEAR, DATA_SIZE, PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < DATA_SIZE; i++) {
        data[i] = background[i] = (uint8_t)(i * 37 >> 3 ^ i);
    }
    mprotect(data + READONLY, 4096, PROT_READ);
    uint32_t features = (getauxval(AT_HWCAP2) & 2 ? HOST_FSGSBASE : 0);
    if (!descriptor(0, CODE_LINEAR, 0xffff, true) && !descriptor(1, DATA_LINEAR, DATA_SIZE - 1, false)) {
        features |= HOST_LDT;
    }
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, NULL);
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaddset(&action.sa_mask, SIGALRM);
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++) {
        sigaction(signals[i], &action, NULL);
    }
    uint32_t n = features;
    if (write(1, &n, sizeof n) != sizeof n) {
        return 1;
    }
    while (read(0, &n, sizeof n) == sizeof n) {
        count = (int)n;
        index_ = -1;
        alarm(PATIENCE);
        __asm__ volatile("int3" : : : "memory");
        alarm(0);
        if (write(1, &n, sizeof n) != sizeof n) {
            return 1;
        }
    }
    return 0;
}
