/* Faults of a disk in a real program: LD_PRELOAD=shim.so FAULT_UNDER=/folder ... program

   Counts the libc calls that change what is below FAULT_UNDER, logs each, and at one of them does
   what it is told. Directories' opens and closes count, too: their fsync stands between them.

     FAULT_LOG     a line for each counted call: its kind and its path
     FAULT_FROM    counts from the first call whose path holds this text; empty: at once
     FAULT_UNTIL   and ends before the first whose path holds this one, killed if HOW is kill
     FAULT_KINDS   counts these kinds only, with a comma after each: "write,fsync,"; empty: all
     FAULT_AT      the number of the call; 0: none, only the log
     FAULT_HOW     kill: SIGKILL before it; once: it fails; on: it and all after it fail;
                   short: a write of half, and all after it fail
     FAULT_ERRNO   how they fail */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum verdict { PASS, FAIL, SHORT };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int armed, over;
static long counted;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int log_file(void) {
    static int file = -2;  /* opened behind the shim's back */
    if (file == -2)
        file = syscall(SYS_openat, AT_FDCWD, setting("FAULT_LOG"),
                       O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    return file;
}

static void die(void) {
    for (;;) syscall(SYS_kill, getpid(), SIGKILL);
}

/* What is to become of a call of this kind on this absolute path. */
static enum verdict judge(const char *kind, const char *path) {
    const char *under = setting("FAULT_UNDER"), *from = setting("FAULT_FROM");
    const char *until = setting("FAULT_UNTIL"), *kinds = setting("FAULT_KINDS");
    const char *how = setting("FAULT_HOW");
    long at = atol(setting("FAULT_AT"));
    char line[PATH_MAX + 32], name[32];
    enum verdict verdict = PASS;
    if (!*under || strncmp(path, under, strlen(under)) || path[strlen(under)] != '/') return PASS;
    snprintf(name, sizeof name, "%s,", kind);
    pthread_mutex_lock(&mutex);
    armed |= !*from || strstr(path, from) != NULL;
    if (armed && !over && *until && strstr(path, until)) {
        over = 1;
        if (at && !strcmp(how, "kill")) die();
    }
    if (armed && !over && (!*kinds || strstr(kinds, name))) {
        counted++;
        int length = snprintf(line, sizeof line, "%s %s\n", kind, path);
        if (log_file() >= 0) syscall(SYS_write, log_file(), line, length);
        if (at && (counted == at || (counted > at && (!strcmp(how, "on") || !strcmp(how, "short")))))
            verdict = counted == at && !strcmp(how, "short") ? SHORT : FAIL;
        if (verdict != PASS && !strcmp(how, "kill")) die();
    }
    pthread_mutex_unlock(&mutex);
    if (verdict != PASS) errno = atoi(setting("FAULT_ERRNO"));
    return verdict;
}

static enum verdict judge_descriptor(const char *kind, int descriptor) {
    char link[64], path[PATH_MAX] = "";
    int flags = fcntl(descriptor, F_GETFL);
    struct stat status;
    if (flags < 0 || fstat(descriptor, &status)) return PASS;
    if ((flags & O_ACCMODE) == O_RDONLY && !S_ISDIR(status.st_mode)) return PASS;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length < 0 ? PASS : judge(kind, path);
}

static enum verdict judge_path(const char *kind, int folder, const char *name) {
    char link[64], path[2 * PATH_MAX] = "";
    if (*name != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d",
                 folder);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        if (length < 0) return PASS;
        path[length] = '/';
    }
    strncat(path, name, PATH_MAX - 1);
    path[PATH_MAX - 1] = 0;
    return judge(kind, path);
}

static int open_judged(int folder, const char *name, int flags, mode_t mode) {
    struct stat status;
    const char *kind = flags & O_CREAT ? "create" : "open";
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (changes || (!fstatat(folder, name, &status, 0) && S_ISDIR(status.st_mode)))
        if (judge_path(kind, folder, name) != PASS) return -1;
    return syscall(SYS_openat, folder, name, flags, mode);
}

#define MODE(flags, mode)                                    \
    mode_t mode = 0;                                         \
    if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {    \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode = va_arg(rest, mode_t);                         \
        va_end(rest);                                        \
    }
#define OPEN(symbol)                                         \
    int symbol(const char *name, int flags, ...) {           \
        MODE(flags, mode)                                    \
        return open_judged(AT_FDCWD, name, flags, mode);     \
    }
#define OPENAT(symbol)                                       \
    int symbol(int folder, const char *name, int flags, ...) { \
        MODE(flags, mode)                                    \
        return open_judged(folder, name, flags, mode);       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* The rest call what they replace; `real` is looked up once in each. */
#define REAL(result, symbol, ...)                            \
    static result (*real)(__VA_ARGS__);                      \
    if (!real) real = dlsym(RTLD_NEXT, #symbol)

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    enum verdict verdict = judge_descriptor("write", descriptor);
    if (verdict == FAIL || (verdict == SHORT && size < 2)) return -1;
    return real(descriptor, bytes, verdict == SHORT ? size / 2 : size);
}

#define PWRITE(symbol)                                                                \
    ssize_t symbol(int descriptor, const void *bytes, size_t size, off_t at) {        \
        REAL(ssize_t, symbol, int, const void *, size_t, off_t);                      \
        return judge_descriptor("write", descriptor) ? -1 : real(descriptor, bytes, size, at); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return judge_descriptor("write", descriptor) ? -1 : real(descriptor, parts, count);
}

#define BY_DESCRIPTOR(symbol, kind)                          \
    int symbol(int descriptor) {                             \
        REAL(int, symbol, int);                              \
        return judge_descriptor(kind, descriptor) ? -1 : real(descriptor); \
    }
BY_DESCRIPTOR(fsync, "fsync")
BY_DESCRIPTOR(fdatasync, "fsync")
BY_DESCRIPTOR(close, "close")

#define TRUNCATE(symbol)                                     \
    int symbol(int descriptor, off_t size) {                 \
        REAL(int, symbol, int, off_t);                       \
        return judge_descriptor("truncate", descriptor) ? -1 : real(descriptor, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int mkdir(const char *name, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return judge_path("mkdir", AT_FDCWD, name) ? -1 : real(name, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return judge_path("rename", AT_FDCWD, from) ? -1 : real(from, to);
}

int renameat(int folder, const char *from, int other, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    return judge_path("rename", folder, from) ? -1 : real(folder, from, other, to);
}

#define REMOVE(symbol)                                       \
    int symbol(const char *name) {                           \
        REAL(int, symbol, const char *);                     \
        return judge_path("remove", AT_FDCWD, name) ? -1 : real(name); \
    }
REMOVE(unlink)
REMOVE(rmdir)

int unlinkat(int folder, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    return judge_path("remove", folder, name) ? -1 : real(folder, name, flags);
}
