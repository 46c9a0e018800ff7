/* Lets the nth file operation below a folder fail, for a process that asks for it. Loaded with LD_PRELOAD; it does
   nothing until iofault_arm() is called, and a program that is executed from there begins unarmed again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, RENAME = 4, CREATE = 8, TRUNCATE = 16, UNLINK = 32 };

static char below[PATH_MAX];
static size_t below_length;
static int kinds, code, for_ever;
static long nth;
static atomic_long count;
static pid_t armed;

void iofault_arm(const char *folder, int which, long number, int error, int always)
{
    strncpy(below, folder, sizeof below - 1);
    below_length = strlen(below);
    kinds = which;
    nth = number;
    code = error;
    for_ever = always;
    atomic_store(&count, 0);
    armed = getpid();
}

long iofault_count(void) { return atomic_load(&count); }

static int is_below(const char *path)
{
    return strncmp(path, below, below_length) == 0 && (path[below_length] == '/' || path[below_length] == 0);
}

static int fails(int kind)
{
    long number = atomic_fetch_add(&count, 1) + 1;
    (void)kind;
    if (number == nth || (for_ever && nth > 0 && number > nth)) {
        errno = code;
        return 1;
    }
    return 0;
}

static int wanted(int kind) { return armed && (kinds & kind) && armed == getpid(); }

static int path_fails(int kind, int folder, const char *path)
{
    char whole[2 * PATH_MAX], link[64];
    ssize_t length = 0;
    if (!wanted(kind))
        return 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD)
            length = getcwd(whole, PATH_MAX) ? (ssize_t)strlen(whole) : 0;
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = readlink(link, whole, PATH_MAX);
        }
        if (length <= 0)
            return 0;
        whole[length++] = '/';
    }
    snprintf(whole + length, PATH_MAX, "%s", path);
    return is_below(whole) && fails(kind);
}

static int descriptor_fails(int kind, int descriptor)
{
    char link[64], path[PATH_MAX];
    ssize_t length;
    if (!wanted(kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return is_below(path) && fails(kind);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define ON_DESCRIPTOR(kind, type, name, arguments, passed) \
    type name arguments \
    { \
        REAL(name); \
        return descriptor_fails(kind, fd) ? -1 : real passed; \
    }

ON_DESCRIPTOR(WRITE, ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_DESCRIPTOR(WRITE, ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_DESCRIPTOR(WRITE, ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_DESCRIPTOR(WRITE, ssize_t, writev, (int fd, const struct iovec *data, int parts), (fd, data, parts))
ON_DESCRIPTOR(SYNC, int, fsync, (int fd), (fd))
ON_DESCRIPTOR(SYNC, int, fdatasync, (int fd), (fd))
ON_DESCRIPTOR(TRUNCATE, int, ftruncate, (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(TRUNCATE, int, ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(kind, name, arguments, passed) \
    int name arguments \
    { \
        REAL(name); \
        return path_fails(kind, AT_FDCWD, path) ? -1 : real passed; \
    }

ON_PATH(UNLINK, unlink, (const char *path), (path))
ON_PATH(CREATE, mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(RENAME, rename, (const char *path, const char *other), (path, other))

int renameat(int folder, const char *path, int folder2, const char *other)
{
    REAL(renameat);
    return path_fails(RENAME, folder, path) ? -1 : real(folder, path, folder2, other);
}

int unlinkat(int folder, const char *path, int flags)
{
    REAL(unlinkat);
    return path_fails(UNLINK, folder, path) ? -1 : real(folder, path, flags);
}

#define MODE(flags, last) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list more; \
        va_start(more, last); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

/* An open() that may make the file or write to it. */
static int opens(int folder, const char *path, int flags)
{
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && path_fails(CREATE, folder, path);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        MODE(flags, flags) \
        REAL(name); \
        return opens(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) \
    { \
        MODE(flags, flags) \
        REAL(name); \
        return opens(folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
