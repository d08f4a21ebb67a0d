#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "report.h"

typedef unsigned long long u64;

static void *clock_thread(void *argument)
{
    uint64_t limit = *(unsigned *)argument * 1000000ull;
    struct sched_param urgent = {.sched_priority = 10};
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &urgent);
    const struct timespec nap = {.tv_nsec = 1000000};
    uint64_t before = clock_ns(), before_tsc = tsc();
    for (;;) {
        nanosleep(&nap, NULL);
        uint64_t now = clock_ns(), now_tsc = tsc();
        if (now - before >= limit)
            report("@gap %llu %llu %llu", (u64)before_tsc, (u64)now_tsc, (u64)(now - before));
        before = now;
        before_tsc = now_tsc;
    }
    return NULL;
}

/* A record of /dev/kmsg is "PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;TEXT\n" and continuation lines
 * (kernel documentation, ABI/testing/dev-kmsg). */
static void *kernel_thread(void *argument)
{
    int fd = *(int *)argument;
    char record[4096];
    for (;;) {
        ssize_t length = read(fd, record, sizeof record - 1);
        if (length < 0 && errno != EPIPE && errno != EINTR)
            give_up("/dev/kmsg");
        if (length <= 0)
            continue;
        record[length] = 0;
        char *text = strchr(record, ';');
        if (text == NULL)
            continue;
        text[strcspn(text, "\n")] = 0;
        report("@kmsg %llu %d %s", (u64)tsc(), atoi(record) & 7, text + 1);
    }
    return NULL;
}

static void start(void *(*work)(void *), void *argument)
{
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, work, argument)) != 0)
        give_up("thread");
}

void watch_clock(unsigned gap_ms)
{
    static unsigned limit;
    limit = gap_ms;
    start(clock_thread, &limit);
}

void watch_kernel(void)
{
    static int fd;
    fd = open("/dev/kmsg", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || lseek(fd, 0, SEEK_END) < 0)
        give_up("/dev/kmsg");
    start(kernel_thread, &fd);
}
