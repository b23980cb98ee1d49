/* Counts the calls of a process that change files below one folder, and lets one of them fail.
 *
 * Preloaded (LD_PRELOAD) and armed by fault_arm(). Calls that only read are never touched. See faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, FAIL_ONCE, FAIL_FROM, SHORT_WRITE, KILL_AFTER };
enum decision { CONTINUE, FAIL, HALF, KILL };

static char root[PATH_MAX];
static size_t root_length;
static int target, mode, error_code, log_fd = -1;
static volatile int count;

/* Starts counting. `n` is the call to fail, from 1; `log` a file descriptor for one line a call, or -1. */
void fault_arm(const char *folder, int n, int how, int code, int log) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    target = n, mode = how, error_code = code, log_fd = log;
    count = 0;
}

int fault_count(void) { return count; }

/* 1 if the path is below the folder; `full` is then absolute. */
static int inside(int folder, const char *path, char *full) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX / 2], link[64];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        snprintf(full, PATH_MAX, "%s/%s", base, path);
    }
    return !strncmp(full, root, root_length);
}

static int file_inside(int fd, char *full) {
    if (!root_length) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, PATH_MAX - 1);
    if (n < 0) return 0;
    full[n] = 0;
    return !strncmp(full, root, root_length);
}

static enum decision decide(const char *call, const char *path, const char *other) {
    static ssize_t (*plain_write)(int, const void *, size_t);
    int saved = errno, n = __sync_add_and_fetch(&count, 1);
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\n", n, call, path, other ? other : "");
        if (!plain_write) plain_write = dlsym(RTLD_NEXT, "write");
        if (plain_write(log_fd, line, length) < 0) abort();
    }
    errno = saved;
    int removes = !strcmp(call, "unlink") || !strcmp(call, "rmdir"); /* a full disk still removes files */
    if (mode == FAIL_FROM && n >= target) return removes ? CONTINUE : FAIL;
    if (n != target) return CONTINUE;
    if (mode == SHORT_WRITE) return strcmp(call, "write") ? CONTINUE : HALF;
    return mode == FAIL_ONCE ? FAIL : mode == KILL_AFTER ? KILL : CONTINUE;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define DECIDE(call, path, other) \
    enum decision now = decide(call, path, other); \
    if (now == FAIL) { errno = error_code; return -1; }

#define FINISH(result) \
    do { \
        __typeof__(result) value = result; \
        if (now == KILL) _exit(137); \
        return value; \
    } while (0)

#define MODE_OF(flags) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = va_arg(rest, mode_t); \
    va_end(rest)

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags); \
        char full[PATH_MAX]; \
        if (!CHANGES(flags) || !inside(AT_FDCWD, path, full)) return real(path, flags, bits); \
        DECIDE("open", full, 0) \
        FINISH(real(path, flags, bits)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags); \
        char full[PATH_MAX]; \
        if (!CHANGES(flags) || !inside(folder, path, full)) return real(folder, path, flags, bits); \
        DECIDE("open", full, 0) \
        FINISH(real(folder, path, flags, bits)); \
    }
OPENAT(openat)
OPENAT(openat64)

static size_t half(size_t size) { return size > 1 ? size / 2 : size; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    char full[PATH_MAX];
    if (!file_inside(fd, full)) return real(fd, data, size);
    DECIDE("write", full, 0)
    FINISH(real(fd, data, now == HALF ? half(size) : size));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    char full[PATH_MAX];
    if (!file_inside(fd, full)) return real(fd, data, size, at);
    DECIDE("write", full, 0)
    FINISH(real(fd, data, now == HALF ? half(size) : size, at));
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    char full[PATH_MAX];
    if (!file_inside(fd, full)) return real(fd, parts, n);
    DECIDE("write", full, 0)
    FINISH(real(fd, parts, now == HALF ? 1 : n));
}

#define ON_FILE(name, call) \
    int name(int fd) { \
        REAL(name); \
        char full[PATH_MAX]; \
        if (!file_inside(fd, full)) return real(fd); \
        DECIDE(call, full, 0) \
        FINISH(real(fd)); \
    }
ON_FILE(fsync, "fsync")
ON_FILE(fdatasync, "fsync")

#define TRUNCATE(name, type) \
    int name(int fd, type size) { \
        REAL(name); \
        char full[PATH_MAX]; \
        if (!file_inside(fd, full)) return real(fd, size); \
        DECIDE("truncate", full, 0) \
        FINISH(real(fd, size)); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, type) \
    int name(int fd, type at, type size) { \
        REAL(name); \
        char full[PATH_MAX]; \
        if (!file_inside(fd, full)) return real(fd, at, size); \
        enum decision now = decide("allocate", full, 0); \
        if (now == FAIL) return error_code; \
        FINISH(real(fd, at, size)); \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define TWO_PATHS(name, call) \
    int name(const char *from, const char *to) { \
        REAL(name); \
        char a[PATH_MAX], b[PATH_MAX]; \
        if (!(inside(AT_FDCWD, from, a) | inside(AT_FDCWD, to, b))) return real(from, to); \
        DECIDE(call, a, b) \
        FINISH(real(from, to)); \
    }
TWO_PATHS(rename, "rename")
TWO_PATHS(link, "link")

int renameat(int x, const char *from, int y, const char *to) {
    REAL(renameat);
    char a[PATH_MAX], b[PATH_MAX];
    if (!(inside(x, from, a) | inside(y, to, b))) return real(x, from, y, to);
    DECIDE("rename", a, b)
    FINISH(real(x, from, y, to));
}

int linkat(int x, const char *from, int y, const char *to, int flags) {
    REAL(linkat);
    char a[PATH_MAX], b[PATH_MAX];
    if (!(inside(x, from, a) | inside(y, to, b))) return real(x, from, y, to, flags);
    DECIDE("link", a, b)
    FINISH(real(x, from, y, to, flags));
}

#define ONE_PATH(name, call) \
    int name(const char *path) { \
        REAL(name); \
        char full[PATH_MAX]; \
        if (!inside(AT_FDCWD, path, full)) return real(path); \
        DECIDE(call, full, 0) \
        FINISH(real(path)); \
    }
ONE_PATH(unlink, "unlink")
ONE_PATH(rmdir, "rmdir")

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char full[PATH_MAX];
    if (!inside(folder, path, full)) return real(folder, path, flags);
    DECIDE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", full, 0)
    FINISH(real(folder, path, flags));
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    char full[PATH_MAX];
    if (!inside(AT_FDCWD, path, full) || !access(full, F_OK)) return real(path, bits); /* changes nothing */
    DECIDE("mkdir", full, 0)
    FINISH(real(path, bits));
}

int mkdirat(int folder, const char *path, mode_t bits) {
    REAL(mkdirat);
    char full[PATH_MAX];
    if (!inside(folder, path, full) || !access(full, F_OK)) return real(folder, path, bits);
    DECIDE("mkdir", full, 0)
    FINISH(real(folder, path, bits));
}
