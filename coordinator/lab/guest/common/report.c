#include "report.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void report(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    for (int done = 0; done < length;) {
        ssize_t count = write(STDOUT_FILENO, line + done, (size_t)(length - done));
        if (count < 0 && errno != EINTR)
            return;
        done += count > 0 ? (int)count : 0;
    }
}

void give_up(const char *what)
{
    int error = errno;
    for (;;) {
        report("@failed %llu %s: %s", (unsigned long long)tsc(), what, strerror(error));
        sleep(60);
    }
}
