/*
 * The APIC timer (SDM vol. 3 section 11.5.4) and the thread that draws a running vCPU's attention to
 * it. The timer's input clock is 1 GHz, so a count is a nanosecond of guest time.
 *
 * The thread waits on a timerfd. To arm a deadline later than the one it waits for costs nothing: it
 * wakes early, finds nothing due and waits again. While guest time stands still it is not armed;
 * whoever starts time raises ATTN_TIMER, and apic_timer_check() arms it.
 *
 * No deadline is lost. `deadline` and `armed` change under one lock, and set() follows each change: the timerfd is set for
 * `armed`, which is never later than the deadline, so the thread wakes in time or too early. When it wakes it takes back
 * `armed` and calls set() again; so also where its read() found nothing because the vCPU had set the timerfd anew
 * between poll() and read(). A deadline that it takes away has raised ATTN_TIMER, after which apic_timer_check() looks at the
 * registers themselves and arms for what they say. A vCPU that sleeps needs no thread: vcpu_sleep() waits for its deadline.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "apic_private.h"

struct apic_timer {
    pthread_t thread;
    pthread_mutex_t lock;
    int timer_fd, stop_fd;
    uint64_t deadline;     /* guest ns; 0 = none */
    uint64_t armed;        /* CLOCK_MONOTONIC ns for which the timerfd is set; SEG_NO_OFFSET = it is not */
    struct seg_header *seg;
    uint32_t index;
};

/* ---- the thread ---- */
static void set(struct apic_timer *t) /* under the lock */
{
    uint64_t host = t->deadline ? guest_host_deadline(t->seg, t->deadline) : SEG_NO_OFFSET;
    if (host >= t->armed) {
        return;
    }
    t->armed = host;
    struct itimerspec spec = {.it_value = {(time_t)(host / 1000000000u), (long)(host % 1000000000u)}};
    if (host == 0) {
        spec.it_value.tv_nsec = 1; /* 0 would disarm */
    }
    timerfd_settime(t->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

static void expired(struct apic_timer *t)
{
    uint64_t count;
    ssize_t got = read(t->timer_fd, &count, sizeof count);
    (void)got; /* non-blocking: nothing there means that it was set again meanwhile */
    pthread_mutex_lock(&t->lock);
    t->armed = SEG_NO_OFFSET;
    if (t->deadline && guest_now(t->seg) >= t->deadline) {
        t->deadline = 0; /* apic_timer_check() arms the next */
        vcpu_attend(t->seg, t->index, ATTN_TIMER);
    }
    set(t);
    pthread_mutex_unlock(&t->lock);
}

static void *run(void *arg)
{
    struct apic_timer *t = arg;
    for (;;) {
        struct pollfd fds[2] = {{.fd = t->timer_fd, .events = POLLIN}, {.fd = t->stop_fd, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0) {
            continue;
        }
        if (fds[1].revents) {
            return NULL;
        }
        expired(t);
    }
}

int apic_timer_start(struct cpu *c)
{
    struct apic_timer *t = calloc(1, sizeof *t);
    if (!t) {
        return -ENOMEM;
    }
    *t = (struct apic_timer){.lock = PTHREAD_MUTEX_INITIALIZER, .armed = SEG_NO_OFFSET, .seg = c->seg, .index = c->index};
    t->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    t->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (t->timer_fd < 0 || t->stop_fd < 0) {
        int error = errno;
        free(t);
        return -error;
    }
    sigset_t all, before; /* signals are for Python's main thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&t->thread, NULL, run, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        close(t->timer_fd);
        close(t->stop_fd);
        free(t);
        return -error;
    }
    c->timer = t;
    return 0;
}

void apic_timer_stop(struct cpu *c)
{
    struct apic_timer *t = c->timer;
    if (!t) {
        return;
    }
    eventfd_write(t->stop_fd, 1);
    pthread_join(t->thread, NULL);
    close(t->timer_fd);
    close(t->stop_fd);
    free(t);
    c->timer = NULL;
}

void apic_timer_arm(struct cpu *c)
{
    struct apic_timer *t = c->timer;
    if (!t) {
        return;
    }
    pthread_mutex_lock(&t->lock);
    t->deadline = c->s.arch.apic.timer_deadline_ns;
    set(t);
    pthread_mutex_unlock(&t->lock);
}

/* ---- the timer itself ---- */
static unsigned shift_of(uint32_t divide) /* figure 11-10: 000 = by 2 ... 110 = by 128, 111 = by 1 */
{
    return (((divide & 3) | (divide & 8) >> 1) + 1) & 7;
}

static uint64_t period(const struct apic_state *a) { return (uint64_t)a->timer_initial << shift_of(a->timer_divide); }

void apic_timer_clear(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    a->timer_deadline_ns = a->tsc_deadline = 0;
    apic_timer_arm(c);
}

uint32_t apic_timer_count(const struct cpu *c)
{
    const struct apic_state *a = &c->s.arch.apic;
    if (!a->timer_deadline_ns || TIMER_MODE(a->lvt_timer) == TIMER_TSC_DEADLINE) {
        return 0;
    }
    uint64_t now = guest_now(c->seg), left = 0;
    if (now < a->timer_deadline_ns) {
        left = a->timer_deadline_ns - now;
    } else if (TIMER_MODE(a->lvt_timer) == TIMER_PERIODIC && period(a)) {
        left = period(a) - (now - a->timer_deadline_ns) % period(a);
    }
    uint64_t unit = UINT64_C(1) << shift_of(a->timer_divide);
    return (uint32_t)((left + unit - 1) / unit);
}

void apic_timer_load(struct cpu *c, uint32_t initial)
{
    struct apic_state *a = &c->s.arch.apic;
    if (TIMER_MODE(a->lvt_timer) == TIMER_TSC_DEADLINE) {
        return; /* ignored in this mode: section 11.5.4.1 */
    }
    a->timer_initial = initial;
    a->timer_start_ns = guest_now(c->seg);
    a->timer_deadline_ns = initial ? a->timer_start_ns + period(a) : 0;
    apic_timer_arm(c);
}

void apic_timer_divide(struct cpu *c, uint32_t divide)
{
    struct apic_state *a = &c->s.arch.apic;
    uint32_t left = apic_timer_count(c);
    a->timer_divide = divide & 0xb;
    if (a->timer_deadline_ns && TIMER_MODE(a->lvt_timer) != TIMER_TSC_DEADLINE) { /* the count goes on at the new rate */
        a->timer_deadline_ns = guest_now(c->seg) + ((uint64_t)left << shift_of(a->timer_divide));
        apic_timer_arm(c);
    }
}

void apic_timer_mode(struct cpu *c, uint32_t lvt)
{
    struct apic_state *a = &c->s.arch.apic;
    bool was = TIMER_MODE(a->lvt_timer) == TIMER_TSC_DEADLINE, is = TIMER_MODE(lvt) == TIMER_TSC_DEADLINE;
    if (was != is) {
        a->timer_initial = 0;
        apic_timer_clear(c);
    }
}

void apic_timer_deadline(struct cpu *c, uint64_t tsc)
{
    struct apic_state *a = &c->s.arch.apic;
    if (TIMER_MODE(a->lvt_timer) != TIMER_TSC_DEADLINE) {
        return;
    }
    a->tsc_deadline = tsc;
    a->timer_deadline_ns = 0;
    if (tsc) {
        uint64_t guest = tsc - c->s.arch.tsc_adjust; /* wraps: an adjusted TSC may be behind or ahead */
        uint64_t ns = tsc <= cpu_tsc(c) ? guest_now(c->seg) : ns_from_tsc(c->seg, guest);
        a->timer_deadline_ns = ns ? ns : 1;
    }
    apic_timer_check(c);
}

void apic_tsc_changed(struct cpu *c)
{
    if (c->s.arch.apic.tsc_deadline) {
        apic_timer_deadline(c, c->s.arch.apic.tsc_deadline);
    }
}

void apic_timer_check(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    uint64_t now = guest_now(c->seg);
    if (a->timer_deadline_ns && now >= a->timer_deadline_ns) {
        uint64_t step = period(a);
        if (TIMER_MODE(a->lvt_timer) == TIMER_PERIODIC && step) {
            a->timer_deadline_ns += ((now - a->timer_deadline_ns) / step + 1) * step; /* periods missed are one interrupt */
        } else {
            a->timer_deadline_ns = a->tsc_deadline = 0;
        }
        apic_local(c, a->lvt_timer & ~0x700u); /* the entry has no delivery mode: always fixed */
    }
    apic_timer_arm(c);
}

uint64_t apic_timer_due(const struct cpu *c)
{
    uint64_t deadline = c->s.arch.apic.timer_deadline_ns;
    return deadline ? deadline : SEG_NO_OFFSET;
}
