/* What streams and graphs hold: copies, host functions, kernels, graphs, marks. */
#include "hostcuda.h"

#include <stdlib.h>
#include <string.h>

Op *new_op(OpKind kind) {
    Op *op = calloc(1, sizeof *op);
    op->kind = kind;
    return op;
}

static size_t bytes_of_parameters(const Op *op) {
    size_t bytes = 0;
    Object *function = object_at(op->launch.function);
    for (int i = 0; i < op->launch.count; i++) bytes += function->function.sizes[i];
    return bytes;
}

static void take_parameters(Op *op, void *const *params) {
    size_t offset = 0, bytes = bytes_of_parameters(op);
    const size_t *sizes = object_at(op->launch.function)->function.sizes;
    op->launch.values = malloc(bytes ? bytes : 1);
    op->launch.params = calloc(op->launch.count + 1, sizeof(void *));
    for (int i = 0; i < op->launch.count; i++) {
        op->launch.params[i] = memcpy(op->launch.values + offset, params[i], sizes[i]);
        offset += sizes[i];
    }
}

Op *new_launch(Handle function, void *const *params) {
    Op *op = new_op(LAUNCH);
    Object *object = object_at(function);
    op->launch.function = function;
    op->launch.kernel = object->function.kernel;
    while (object->function.sizes[op->launch.count]) op->launch.count++;
    take_parameters(op, params);
    return op;
}

Op *copy_of(const Op *op) {
    Op *copied = new_op(op->kind);
    *copied = *op;
    copied->next = NULL;
    if (op->kind == LAUNCH) take_parameters(copied, op->launch.params);
    return copied;
}

void free_op(Op *op) {
    if (op->kind == COPY) free(op->copy.staged);
    if (op->kind == RECORD || op->kind == WAIT) release_record(op->record);
    if (op->kind == LAUNCH) {
        free(op->launch.params);
        free(op->launch.values);
    }
    free(op);
}

void push_op(Queue *queue, Op *op) {
    if (queue->last)
        queue->last->next = op;
    else
        queue->first = op;
    queue->last = op;
}

Op *pop_op(Queue *queue) {
    Op *op = queue->first;
    queue->first = op->next;
    if (!queue->first) queue->last = NULL;
    return op;
}

void clear_queue(Queue *queue) {
    while (queue->first) {
        Op *op = pop_op(queue);
        if (op->kind == RECORD) op->record->done = true; /* or who waits for it would wait for ever */
        free_op(op);
    }
}

static void run_work(const Op *op) {
    unsigned grid[3], block[3];
    *inside_work() = true;
    if (op->kind == CALL) op->call.function(op->call.data);
    if (op->kind == LAUNCH) {
        memcpy(grid, op->launch.grid, sizeof grid);
        memcpy(block, op->launch.block, sizeof block);
        op->launch.kernel(op->launch.params, grid, block);
    }
    *inside_work() = false;
}

void run_op(const Op *op) {
    if (op->kind == COPY) memmove(op->copy.target, op->copy.source, op->copy.size);
    if (op->kind == CALL || op->kind == LAUNCH) run_work(op);
    if (op->kind == GRAPH_LAUNCH)
        for (const Op *node = op->graph.nodes->first; node; node = node->next) run_op(node);
}

static bool touches(const char *start, size_t length, const char *address, size_t size) {
    return start < address + size && address < start + length;
}

bool overlaps(const Queue *queue, const char *address, size_t size) {
    for (const Op *op = queue->first; op; op = op->next) {
        if (op->kind == COPY && (touches(op->copy.target, op->copy.size, address, size) ||
                                 touches(op->copy.source, op->copy.size, address, size)))
            return true;
        if (op->kind == GRAPH_LAUNCH && overlaps(op->graph.nodes, address, size)) return true;
    }
    return false;
}

bool uses(const Queue *queue, OpKind kind, Handle handle) {
    for (const Op *op = queue->first; op; op = op->next) {
        if (op->kind == kind && kind == GRAPH_LAUNCH && op->graph.exec == handle) return true;
        if (op->kind == kind && kind == LAUNCH) {
            Object *function = object_at(op->launch.function);
            if (function->function.module == handle) return true;
        }
        if (op->kind == GRAPH_LAUNCH && kind == LAUNCH && uses(op->graph.nodes, kind, handle)) return true;
    }
    return false;
}

/* ---- marks ---- */

Record *share(Record *record) {
    record->references++;
    return record;
}

void release_record(Record *record) {
    if (record && !--record->references) free(record);
}
