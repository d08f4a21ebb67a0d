/*
 * The mechanism: a seccomp filter made from the table in policy.h, and the calls of Landlock, which the C library does not
 * have and older kernel headers know by half.
 *
 * Sources: Documentation/userspace-api/seccomp_filter.rst and landlock.rst of Linux, seccomp(2), landlock(7), capset(2).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "sandbox.h"

#ifndef __x86_64__
#error "the table of system calls and the filter are for x86-64"
#endif

/* ---- seccomp ----------------------------------------------------------------------------------------------------- */
enum test { ALLOW, ARGUMENT_IS, ARGUMENT_LACKS, ARGUMENT_HAS, ARGUMENT_IS_ME, DENY, UNKNOWN, KILL };

struct rule {
    uint16_t number;
    uint8_t roles, test, argument;
    uint32_t value;
    const char *name;
};

#define ROW(call, roles, test, argument, value) {__NR_##call, (roles), (test), (argument), (value), #call}
#include "policy.h"

enum { RULES = sizeof policy / sizeof policy[0], MOST_CODE = 8 + 8 * RULES };
/* x32 calls have this bit in their number */
#define X32 0x40000000
#define FIELD(name) ((uint32_t)offsetof(struct seccomp_data, name))

struct program {
    unsigned length;
    struct sock_filter code[MOST_CODE];
};

static void emit(struct program *p, uint16_t code, uint32_t k, uint8_t if_true, uint8_t if_false)
{
    p->code[p->length++] = (struct sock_filter){code, if_true, if_false, k};
}

static void load(struct program *p, uint32_t field)
{
    emit(p, BPF_LD | BPF_W | BPF_ABS, field, 0, 0);
}

static void result(struct program *p, uint32_t value)
{
    emit(p, BPF_RET | BPF_K, value, 0, 0);
}

static int is_argument(uint8_t test)
{
    return test >= ARGUMENT_IS && test <= ARGUMENT_IS_ME;
}

/* The number of the call is loaded before and after. A test looks at the argument's low half: what the kernel itself
 * looks at, or, for 0, a pointer, whose halves are both looked at. */
static void rule(struct program *p, const struct rule *r)
{
    const uint32_t argument = FIELD(args) + 8 * r->argument;
    static const uint32_t outcomes[] = {
        [ALLOW] = SECCOMP_RET_ALLOW,
        [DENY] = SECCOMP_RET_ERRNO | EPERM,
        [UNKNOWN] = SECCOMP_RET_ERRNO | ENOSYS,
        [KILL] = SECCOMP_RET_KILL_PROCESS,
    };
    if (!is_argument(r->test)) {
        emit(p, BPF_JMP | BPF_JEQ | BPF_K, r->number, 0, 1);
        result(p, outcomes[r->test]);
        return;
    }
    const unsigned begin = p->length;
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, r->number, 0, 0);
    load(p, argument);
    switch (r->test) {
    case ARGUMENT_IS:
        if (r->value == 0) {
            emit(p, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3);
            load(p, argument + 4);
        }
        emit(p, BPF_JMP | BPF_JEQ | BPF_K, r->value, 0, 1);
        break;
    case ARGUMENT_IS_ME:
        emit(p, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)getpid(), 0, 1);
        break;
    case ARGUMENT_LACKS:
        emit(p, BPF_JMP | BPF_JSET | BPF_K, r->value, 1, 0);
        break;
    case ARGUMENT_HAS:
        emit(p, BPF_JMP | BPF_JSET | BPF_K, r->value, 0, 1);
        break;
    }
    result(p, SECCOMP_RET_ALLOW);
    load(p, FIELD(nr));
    p->code[begin].jf = (uint8_t)(p->length - begin - 1);
}

static void compile(struct program *p, unsigned role)
{
    p->length = 0;
    load(p, FIELD(arch));
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    result(p, SECCOMP_RET_KILL_PROCESS);
    load(p, FIELD(nr));
    emit(p, BPF_JMP | BPF_JGE | BPF_K, X32, 0, 1);
    result(p, SECCOMP_RET_KILL_PROCESS);
    for (unsigned i = 0; i < RULES; i++)
        if (policy[i].roles & role)
            rule(p, &policy[i]);
    result(p, SECCOMP_RET_TRAP);
}

static char whose[32];
/* a bit for each call that has been logged: once is enough */
static uint64_t told[16];

static const char *name_of(unsigned number)
{
    for (unsigned i = 0; i < RULES; i++)
        if (policy[i].number == number)
            return policy[i].name;
    return "without a name here";
}

/* A call without a row: a line, and EPERM. A thread that blocks SIGSYS is killed with its process instead, as the
 * kernel has it. Only functions that signal-safety(7) names, and snprintf of numbers and strings, which takes no lock. */
static void on_sigsys(int number, siginfo_t *info, void *context)
{
    (void)number;
    const int saved = errno;
    const unsigned call = (unsigned)info->si_syscall;
    const uint64_t bit = 1ull << call % 64;
    if (!(__atomic_fetch_or(&told[call / 64 % 16], bit, __ATOMIC_RELAXED) & bit)) {
        char line[128];
        const int length = snprintf(line, sizeof line, "sandbox: %s: system call %u (%s) refused\n", whose, call, name_of(call));
        if (write(2, line, (size_t)length) < 0)
            errno = saved; /* a full disk: the refusal counts */
    }
    errno = saved;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RAX] = -EPERM;
}

int sandbox_seccomp(enum role role, const char *name)
{
    static struct program program;
    snprintf(whose, sizeof whose, "%s", name);
    struct sigaction action = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER | SA_ONSTACK};
    if (sigaction(SIGSYS, &action, NULL) < 0)
        return -errno;
    compile(&program, role);
    const struct sock_fprog filter = {(unsigned short)program.length, program.code};
    const long failed = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);
    return failed < 0 ? -errno : failed > 0 ? -ESRCH : 0;
}

/* ---- privileges -------------------------------------------------------------------------------------------------- */
int sandbox_no_new_privileges(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

int sandbox_keep_capabilities(uint64_t keep)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) < 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        const uint32_t wanted = (uint32_t)(keep >> 32 * i);
        data[i].effective &= wanted;
        data[i].permitted &= wanted;
        data[i].inheritable = 0;
    }
    return syscall(SYS_capset, &header, data) < 0 ? -errno : 0;
}

/* ---- Landlock ---------------------------------------------------------------------------------------------------- */
/* linux/landlock.h, here because that of Debian 12 ends with version 2 */
enum { LANDLOCK_CREATE_RULESET = 444, LANDLOCK_ADD_RULE = 445, LANDLOCK_RESTRICT_SELF = 446 };
enum { CREATE_RULESET_VERSION = 1, RULE_PATH_BENEATH = 1 };
enum { NET_BIND_TCP = 1, NET_CONNECT_TCP = 2, SCOPE_ABSTRACT_UNIX_SOCKET = 1, SCOPE_SIGNAL = 2 };
/* versions that brought them */
enum { WITH_NET = 4, WITH_SCOPE = 6 };

struct ruleset_attr {
    uint64_t handled_access_fs, handled_access_net, scoped;
};

struct path_beneath_attr {
    uint64_t allowed_access;
    int32_t parent_fd;
} __attribute__((packed));

int sandbox_landlock_version(void)
{
    const long version = syscall(LANDLOCK_CREATE_RULESET, NULL, 0, CREATE_RULESET_VERSION);
    return version < 0 ? -errno : (int)version;
}

int sandbox_landlock_rules(int version, uint64_t files)
{
    struct ruleset_attr attr = {files, NET_BIND_TCP | NET_CONNECT_TCP, SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL};
    const size_t size = version >= WITH_SCOPE ? sizeof attr
                        : version >= WITH_NET ? offsetof(struct ruleset_attr, scoped)
                                              : offsetof(struct ruleset_attr, handled_access_net);
    const long fd = syscall(LANDLOCK_CREATE_RULESET, &attr, size, 0);
    return fd < 0 ? -errno : (int)fd;
}

int sandbox_landlock_allow(int rules, int fd, uint64_t access)
{
    const struct path_beneath_attr attr = {access, fd};
    return syscall(LANDLOCK_ADD_RULE, rules, RULE_PATH_BENEATH, &attr, 0) < 0 ? -errno : 0;
}

int sandbox_landlock_enforce(int rules)
{
    return syscall(LANDLOCK_RESTRICT_SELF, rules, 0) < 0 ? -errno : 0;
}
