/* A CUDA driver on ordinary memory, for tests: what its files share.
 *
 * Every object is in one ledger, under one mutex that is never held while work runs (host functions take Python's
 * lock). Streams are lazy: work is queued, and done only when somebody synchronizes. What a caller does wrong is
 * noted as misuse, and answered with the code that a real driver gives. Codes and signatures: CUDA Driver API 13.0.
 */
#ifndef HOSTCUDA_H
#define HOSTCUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uintptr_t CUdeviceptr;
typedef void *Handle; /* CUcontext, CUstream, CUevent, CUgraph, CUgraphExec, CUmodule, CUfunction */
typedef void (*HostFunction)(void *data);
typedef void (*Kernel)(void **params, unsigned grid[3], unsigned block[3]);

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_WRONG_THREAD = 908,
};

/* ---- objects (ledger.c) ---- */

typedef enum { CONTEXT, DEVICE_MEMORY, PINNED_MEMORY, STREAM, EVENT, GRAPH, EXEC, MODULE, FUNCTION, KINDS } Kind;

extern const char *const KIND_NAMES[KINDS];

typedef struct Op Op;
typedef struct Record Record;

typedef struct {
    Op *first, *last;
} Queue;

typedef struct {
    Kind kind;
    bool alive;
    union {
        struct { /* both kinds of memory */
            char *address;
            size_t size;
            bool mapped;
        } memory;
        struct {
            Queue queue;
            bool busy;             /* some thread does the work that was first */
            uint64_t queued, done; /* as many came in, as many are done */
            bool capturing, invalidated;
            int mode;          /* of the capture: 0 global, 1 thread-local, 2 relaxed */
            uint64_t capturer; /* the thread that began it */
            Queue captured;
        } stream;
        struct {
            Record *record; /* the latest, NULL before the first */
            bool timed;
        } event;
        Queue nodes; /* of a graph or of what was instantiated from it */
        struct {
            void *library;
        } module;
        struct {
            Handle module;
            Kernel kernel;
            const size_t *sizes; /* of its parameters, ended by 0 */
        } function;
    };
} Object;

/* A mark in a stream; events and waiting streams share it. */
struct Record {
    int references;
    Handle stream;
    bool done;
    double milliseconds;
};

typedef enum { COPY, CALL, LAUNCH, GRAPH_LAUNCH, RECORD, WAIT } OpKind;

struct Op {
    Op *next;
    OpKind kind;
    union {
        struct {
            char *target;
            const char *source;
            size_t size;
            char *staged; /* own copy of pageable memory, or NULL */
        } copy;
        struct {
            HostFunction function;
            void *data;
        } call;
        struct {
            Handle function;
            Kernel kernel;
            unsigned grid[3], block[3];
            int count;
            void **params;
            char *values;
        } launch;
        struct {
            Handle exec;
            const Queue *nodes;
        } graph;
        Record *record; /* of RECORD and WAIT */
    };
};

void lock(void);
void unlock(void);
void changed(void); /* wakes who waits in `wait_for_change` */
void wait_for_change(void); /* with the ledger locked */

Handle add_object(Kind kind, Object **object);
Object *find_object(Kind kind, Handle handle, const char *call); /* NULL and misuse noted if it is none, or dead */
Object *object_at(Handle handle);                                /* NULL if there never was one */
Object *object_number(int number);                               /* NULL behind the last */
/* CU_STREAM_LEGACY and CU_STREAM_PER_THREAD, here one for all threads: always there, for who lends data from them. */
#define DEFAULT_STREAMS 2
bool is_default_stream(Handle handle);
int live(Kind kind);

/* Begins a driver call: counts it, and returns the code with which it is to fail, or 0. Locks the ledger; every
 * call ends with `leave`. */
CUresult enter(const char *call);
/* The same for calls that need a current context and an initialized driver. */
CUresult enter_context(const char *call);
/* The same for what frees: it happens in any case, then the code is returned. `failure` gets the injected code. */
CUresult enter_release(const char *call, CUresult *failure);
CUresult leave(CUresult code);

void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t this_thread(void);
bool *inside_work(void); /* whether this thread runs a host function now, which must not call the driver */

/* ---- contexts and devices (contexts.c) ---- */
bool driver_initialized(void);
bool context_is_current(void);
size_t device_memory_total(void);
bool device_is_integrated(void);
void reset_contexts(void);

/* ---- memory (memory.c) ---- */

/* Whether the range is within one block that the device sees; misuse is noted if not. */
bool is_on_device(const char *address, size_t size, const char *call);
/* Whether the range may be on the host, in one block of pinned memory or in no block (`pageable`); else misuse. */
bool is_on_host(const char *address, size_t size, const char *call, bool *pageable);
bool is_freed(const char *address);
void reset_memory(void);

/* ---- work (work.c): what streams and graphs hold ---- */
Op *new_op(OpKind kind);
Op *new_launch(Handle function, void *const *params); /* copies the parameters */
Op *copy_of(const Op *op);
void free_op(Op *op);
void push_op(Queue *queue, Op *op);
Op *pop_op(Queue *queue);
void clear_queue(Queue *queue); /* marks in it count as passed */
void run_op(const Op *op);      /* without the lock */
bool overlaps(const Queue *queue, const char *address, size_t size);
bool uses(const Queue *queue, OpKind kind, Handle handle);
Record *share(Record *record);
void release_record(Record *record);

/* ---- streams (streams.c) ---- */
Object *usable_stream(Handle stream, const char *call); /* NULL and misuse noted if it is none */
void enqueue(Object *stream, Op *op);                   /* into its queue, or into what it captures */
bool drain(Object *stream, bool may_wait);              /* does what is queued now; false if that would wait */
bool capture_forbids(const char *call); /* this thread captures: `call` is not allowed, and spoils the capture */
bool memory_in_use(const char *address, size_t size);
bool handle_in_use(OpKind kind, Handle handle);
void drop_all_work(void);

#endif
