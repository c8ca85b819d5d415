/* Preloaded, the clocks of a process are wrong: the one that leases go by runs at CLOCK_RATE, the date is CLOCK_OFFSET
   seconds off. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static double setting(const char *name, double usual) {
    const char *text = getenv(name);
    return text ? atof(text) : usual;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = (int)syscall(SYS_clock_gettime, clock, now);
    if (status != 0) return status;
    if (clock == CLOCK_REALTIME) {
        now->tv_sec += (time_t)setting("CLOCK_OFFSET", 0);
    } else if (clock == CLOCK_BOOTTIME) {
        double seconds = (now->tv_sec + now->tv_nsec / 1e9) * setting("CLOCK_RATE", 1);
        now->tv_sec = (time_t)seconds;
        now->tv_nsec = (long)((seconds - now->tv_sec) * 1e9);
    }
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
