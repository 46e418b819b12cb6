/* Makes the n-th system call that touches a directory fail. Loaded with LD_PRELOAD; does nothing until it is armed.
 *
 * `torture_trace` also writes down every change that was carried out, and keeps files that are removed or replaced in a
 * graveyard, so that what a loss of power would have left can be made of it.
 *
 * Calls are counted by kind. `torture_arm` says which directory, which kinds, the number of the first call to fail, with
 * which error, and how: see `fault`. KILL and INTERRUPT stand for SIGKILL and SIGINT in the place of an error.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, READ, WRITE, SYNC, RENAME, LINK, UNLINK, MKDIR, MMAP, TRUNCATE, STAT, LIST, LOCK, CHMOD, KINDS };
enum how { ONCE = 1, ON = 2, AFTER = 3, SHORT = 4 };
enum { KILL = -1, INTERRUPT = -2 };

static struct {
    volatile int armed;
    char directory[PATH_MAX];
    size_t length;
    unsigned kinds; /* bit set */
    long first;     /* number of the call that fails; 0: only count */
    int error;      /* errno, KILL or INTERRUPT */
    int how;        /* ONCE; ON: and all later ones; AFTER: once it was carried out; SHORT: half of it is written */
    long calls, hits, of_kind[KINDS];
    char last[PATH_MAX + 64]; /* the call that failed first */
} fault;

void torture_arm(const char *directory, unsigned kinds, long first, int error, int how) {
    memset(&fault, 0, sizeof fault);
    snprintf(fault.directory, sizeof fault.directory, "%s", directory);
    fault.length = strlen(fault.directory);
    fault.kinds = kinds;
    fault.first = first;
    fault.error = error;
    fault.how = how;
    fault.armed = 1;
}

long torture_disarm(void) {
    fault.armed = 0;
    return fault.hits;
}

long torture_count(int kind) { return fault.of_kind[kind]; }
const char *torture_last(void) { return fault.last; }

static int lies_below(const char *path) {
    return strncmp(path, fault.directory, fault.length) == 0 && (path[fault.length] == '/' || !path[fault.length]);
}

static int name_of(int descriptor, char *name, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlink, link, name, size - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return 1;
}

/* The path that a call means; 0: it does not lie below the directory. NULL: of the descriptor `at` itself. */
static int resolve(int at, const char *path, char *name, size_t size) {
    int before = errno, found = 1;
    if (path && path[0] == '/') {
        snprintf(name, size, "%s", path);
    } else {
        char base[PATH_MAX];
        found = at == AT_FDCWD ? getcwd(base, sizeof base) != NULL : name_of(at, base, sizeof base);
        if (found) snprintf(name, size, "%s%s%s", base, path ? "/" : "", path ? path : "");
    }
    errno = before;
    return found && lies_below(name);
}

/* Whether this call fails now. */
static int fails(enum kind kind, const char *call, int at, const char *path) {
    char name[2 * PATH_MAX];
    if (!fault.armed || !(fault.kinds & 1u << kind) || !resolve(at, path, name, sizeof name)) return 0;
    fault.of_kind[kind]++;
    fault.calls++;
    if (!fault.first || (fault.how == ON ? fault.calls < fault.first : fault.calls != fault.first)) return 0;
    if (!fault.hits++) snprintf(fault.last, sizeof fault.last, "%s %s", call, name + fault.length);
    if (fault.error == INTERRUPT) {
        kill(getpid(), SIGINT);
        return 0;
    }
    if (fault.error == KILL && fault.how != AFTER) kill(getpid(), SIGKILL);
    return 1;
}

/* The trace ------------------------------------------------------------------------------------------------------- */

static int trace = -1;
static char graveyard[PATH_MAX];
static const char *const NAMES[KINDS] = {[CREATE] = "create", [WRITE] = "write",       [SYNC] = "sync",
                                         [RENAME] = "rename", [LINK] = "link",         [UNLINK] = "unlink",
                                         [MKDIR] = "mkdir",   [TRUNCATE] = "write"};

/* From here on; the directory is that of `torture_arm`. */
void torture_trace(const char *file, const char *place) {
    snprintf(graveyard, sizeof graveyard, "%s", place);
    trace = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static unsigned long long inode_of(int at, const char *path) {
    struct statx found;
    int flags = path ? AT_SYMLINK_NOFOLLOW : AT_EMPTY_PATH;
    return syscall(SYS_statx, at, path ? path : "", flags, STATX_INO, &found) ? 0 : found.stx_ino;
}

/* Before a file is removed or replaced: give it one more name. */
static void keep(enum kind kind, int at, const char *path) {
    char name[2 * PATH_MAX], grave[PATH_MAX + 32];
    if (trace < 0 || !fault.armed || (kind != UNLINK && kind != RENAME) || !resolve(at, path, name, sizeof name)) return;
    int before = errno;
    snprintf(grave, sizeof grave, "%s/%llu", graveyard, inode_of(AT_FDCWD, name));
    syscall(SYS_linkat, AT_FDCWD, name, AT_FDCWD, grave, 0);
    errno = before;
}

/* After a call was carried out: the kind, the inode, the path, and where it was before. */
static void note(enum kind kind, int at, const char *path, int from_at, const char *from) {
    char name[2 * PATH_MAX], old[2 * PATH_MAX] = "", line[4 * PATH_MAX + 64];
    if (trace < 0 || !fault.armed || !NAMES[kind] || !resolve(at, path, name, sizeof name)) return;
    int before = errno;
    if (from && !resolve(from_at, from, old, sizeof old)) old[0] = 0;
    unsigned long long inode = kind == UNLINK ? 0 : path ? inode_of(AT_FDCWD, name) : inode_of(at, NULL);
    int length = snprintf(line, sizeof line, "%s\t%llu\t%s\t%s\n", NAMES[kind], inode, name + fault.length,
                          old[0] ? old + fault.length : "");
    syscall(SYS_write, trace, line, length);
    errno = before;
}

/* The calls ------------------------------------------------------------------------------------------------------- */

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* What a call gives that fails; AFTER: it is carried out before. */
#define FAIL(failed, carried_out) \
    do { \
        if (fault.how == AFTER) { \
            carried_out; \
            if (fault.error == KILL) kill(getpid(), SIGKILL); \
        } \
        errno = fault.error; \
        return failed; \
    } while (0)

#define CALL(kind, name, parameters, arguments, at, path, from_at, from) \
    int name parameters { \
        REAL(name); \
        keep(kind, at, path); \
        if (fails(kind, #name, at, path)) FAIL(-1, real arguments); \
        int result = real arguments; \
        if (!result) note(kind, at, path, from_at, from); \
        return result; \
    }
#define PATH_CALL(kind, name, parameters, arguments, at, path) \
    CALL(kind, name, parameters, arguments, at, path, AT_FDCWD, NULL)

#define OPEN_CALL(name, parameters, arguments, at, path) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        if (fails(flags & O_CREAT ? CREATE : OPEN, #name, at, path)) FAIL(-1, (void)0); \
        int file = real arguments; \
        if (file >= 0 && flags & O_CREAT) note(CREATE, at, path, AT_FDCWD, NULL); \
        if (file >= 0 && flags & O_TRUNC) note(WRITE, at, path, AT_FDCWD, NULL); \
        return file; \
    }

OPEN_CALL(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN_CALL(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN_CALL(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at, path)
OPEN_CALL(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at, path)

#define OPENS(type, name) \
    type *name(const char *path, const char *mode) { \
        REAL(name); \
        if (fails(OPEN, #name, AT_FDCWD, path)) FAIL(NULL, (void)0); \
        return real(path, mode); \
    }
OPENS(FILE, fopen)
OPENS(FILE, fopen64)

#define READ_CALL(name, parameters, arguments) \
    ssize_t name parameters { \
        REAL(name); \
        if (fails(READ, #name, file, NULL)) FAIL(-1, (void)0); \
        return real arguments; \
    }
READ_CALL(read, (int file, void *data, size_t size), (file, data, size))
READ_CALL(pread, (int file, void *data, size_t size, off_t at), (file, data, size, at))
READ_CALL(pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at))

#define WRITE_CALL(name, parameters, half, arguments) \
    ssize_t name parameters { \
        REAL(name); \
        if (fails(WRITE, #name, file, NULL)) { \
            if (fault.how == SHORT) return real half; \
            FAIL(-1, real arguments); \
        } \
        note(WRITE, file, NULL, AT_FDCWD, NULL); \
        return real arguments; \
    }
WRITE_CALL(write, (int file, const void *data, size_t size), (file, data, (size + 1) / 2), (file, data, size))
WRITE_CALL(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, (size + 1) / 2, at),
           (file, data, size, at))
WRITE_CALL(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, (size + 1) / 2, at),
           (file, data, size, at))
WRITE_CALL(writev, (int file, const struct iovec *parts, int count), (file, parts, (count + 1) / 2),
           (file, parts, count))

PATH_CALL(SYNC, fsync, (int file), (file), file, NULL)
PATH_CALL(SYNC, fdatasync, (int file), (file), file, NULL)
CALL(RENAME, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, AT_FDCWD, from)
CALL(RENAME, renameat, (int at, const char *from, int there, const char *to), (at, from, there, to), there, to, at, from)
CALL(RENAME, renameat2, (int at, const char *from, int there, const char *to, unsigned flags),
     (at, from, there, to, flags), there, to, at, from)
CALL(LINK, link, (const char *from, const char *to), (from, to), AT_FDCWD, to, AT_FDCWD, from)
CALL(LINK, linkat, (int at, const char *from, int there, const char *to, int flags), (at, from, there, to, flags), there,
     to, at, from)
PATH_CALL(UNLINK, unlink, (const char *path), (path), AT_FDCWD, path)
PATH_CALL(UNLINK, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path)
PATH_CALL(UNLINK, rmdir, (const char *path), (path), AT_FDCWD, path)
PATH_CALL(MKDIR, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
PATH_CALL(MKDIR, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
PATH_CALL(TRUNCATE, ftruncate, (int file, off_t size), (file, size), file, NULL)
PATH_CALL(TRUNCATE, ftruncate64, (int file, off64_t size), (file, size), file, NULL)
PATH_CALL(TRUNCATE, truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path)
PATH_CALL(LOCK, flock, (int file, int operation), (file, operation), file, NULL)
PATH_CALL(CHMOD, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
PATH_CALL(CHMOD, fchmod, (int file, mode_t mode), (file, mode), file, NULL)
PATH_CALL(CHMOD, fchmodat, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags), at, path)
PATH_CALL(STAT, stat, (const char *path, struct stat *into), (path, into), AT_FDCWD, path)
PATH_CALL(STAT, lstat, (const char *path, struct stat *into), (path, into), AT_FDCWD, path)
PATH_CALL(STAT, fstat, (int file, struct stat *into), (file, into), file, NULL)
PATH_CALL(STAT, fstatat, (int at, const char *path, struct stat *into, int flags), (at, path, into, flags), at, path)
PATH_CALL(STAT, stat64, (const char *path, struct stat64 *into), (path, into), AT_FDCWD, path)
PATH_CALL(STAT, lstat64, (const char *path, struct stat64 *into), (path, into), AT_FDCWD, path)
PATH_CALL(STAT, fstat64, (int file, struct stat64 *into), (file, into), file, NULL)
PATH_CALL(STAT, fstatat64, (int at, const char *path, struct stat64 *into, int flags), (at, path, into, flags), at,
          path)
PATH_CALL(STAT, statx, (int at, const char *path, int flags, unsigned mask, struct statx *into),
          (at, path, flags, mask, into), at, path &&*path ? path : NULL)

DIR *opendir(const char *path) {
    REAL(opendir);
    if (fails(LIST, "opendir", AT_FDCWD, path)) FAIL(NULL, (void)0);
    return real(path);
}

DIR *fdopendir(int file) {
    REAL(fdopendir);
    if (fails(LIST, "fdopendir", file, NULL)) FAIL(NULL, (void)0);
    return real(file);
}

#define MMAP_CALL(name, offset) \
    void *name(void *place, size_t size, int protection, int flags, int file, offset at) { \
        REAL(name); \
        if (file >= 0 && fails(MMAP, #name, file, NULL)) FAIL(MAP_FAILED, (void)0); \
        return real(place, size, protection, flags, file, at); \
    }
MMAP_CALL(mmap, off_t)
MMAP_CALL(mmap64, off64_t)
