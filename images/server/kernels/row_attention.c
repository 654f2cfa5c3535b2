/* RowAttention(query, key, value, keys, values, calls, cosines, sines) -> float [.., tokens, heads x size]
 *
 * query float [.., tokens, heads x size], key and value [.., tokens, kv_heads x size]; or query alone, with the other two
 * behind it in each token. keys and values float [slots, kv_heads, length, size] are the cache, which is written: the
 * keys' inside is as attention.h has it. calls int64 [sequences, 3]: slot, tokens in it before, tokens of this call, in
 * the order of the tokens. cosines and sines float [positions, rotated / 2], absent where nothing is turned.
 * Attributes num_heads, kv_num_heads, local_window_size (at most 0: none), scale.
 */
#include <stdlib.h>

#include "kernels.h"
#include "operators.h"

enum { QUERY, KEY, VALUE, KEYS, VALUES, CALLS, COSINES, SINES, INPUTS, WORDS_OF_CALL = 3, MOST_HEADS = 1 << 16 };

typedef struct {
  Place place;
  int alone; /* the only token of its sequence in this call */
} Token;

typedef struct {
  Heads heads;
  Cache cache;
  Tables tables;
  const float *query, *key, *value;
  int64_t query_step, kv_step; /* floats from a token to the next */
  const Token *tokens;
  float *out;
  int failed;
} Attention;

static void keep(const Attention *a, int64_t token, int64_t kv_head) {
  const int64_t at = token * a->kv_step + kv_head * a->heads.size;
  kernels->keep(&a->heads, a->cache, a->tokens[token].place, kv_head, a->key + at, a->value + at, a->tables);
}

static void keep_part(void *data, size_t token) {
  const Attention *a = data;
  if (a->tokens[token].alone) return;
  for (int64_t head = 0; head < a->heads.kv_heads; head++) keep(a, (int64_t)token, head);
}

static void read_part(void *data, size_t part) {
  Attention *a = data;
  const int64_t token = (int64_t)part / a->heads.kv_heads, head = (int64_t)part % a->heads.kv_heads;
  float *scratch = thread_buffer(1, attention_scratch(&a->heads, a->cache) * sizeof(float));
  if (!scratch) {
    a->failed = 1;
    return;
  }
  if (a->tokens[token].alone) keep(a, token, head);
  kernels->read(&a->heads, a->cache, a->tokens[token].place, head, a->query + token * a->query_step, a->tables,
                a->out + token * a->heads.heads * a->heads.size, scratch);
}

/* The tokens of the calls; how many, or -1 where a call is out of bounds. */
static int64_t places(const int64_t *calls, int64_t count, int64_t slots, int64_t longest, int64_t most, Token *to) {
  int64_t made = 0;
  for (int64_t at = 0; at < count; at++, calls += WORDS_OF_CALL) {
    const int64_t slot = calls[0], past = calls[1], size = calls[2];
    if (slot < 0 || slot >= slots || past < 0 || size < 1 || past > longest - size || made > most - size) return -1;
    for (int64_t token = 0; token < size; token++) to[made++] = (Token){{slot, past + token}, size == 1};
  }
  return made;
}

static OrtStatus *attend(void *kernel, OrtKernelContext *context) {
  Attention a = {.heads = *(const Heads *)kernel};
  Heads *h = &a.heads;
  Shape query, key, value, keys, values, calls, cosines, sines;
  const int64_t *told;
  TRY(input(context, QUERY, (const void **)&a.query, &query));
  TRY(input(context, KEY, (const void **)&a.key, &key));
  TRY(input(context, VALUE, (const void **)&a.value, &value));
  TRY(input(context, KEYS, (const void **)&a.cache.keys, &keys));
  TRY(input(context, VALUES, (const void **)&a.cache.values, &values));
  TRY(input(context, CALLS, (const void **)&told, &calls));
  TRY(input(context, COSINES, (const void **)&a.tables.cosines, &cosines));
  TRY(input(context, SINES, (const void **)&a.tables.sines, &sines));
  if (keys.count != 4 || values.count != 4 || keys.sizes[1] != h->kv_heads || keys.sizes[2] % 16 ||
      elements(keys) != elements(values))
    return refused("RowAttention: keys and values are not [slots, kv_heads, length, size]");
  h->size = keys.sizes[3];
  a.cache.length = keys.sizes[2];
  if (h->size < 16 || h->size % 16 || h->size > ATTENTION_MOST_SIZE) return refused("RowAttention: size of a head");
  int64_t longest = a.cache.length;
  if (a.tables.cosines) {
    if (!a.tables.sines || cosines.count != 2 || elements(cosines) != elements(sines) || 2 * cosines.sizes[1] > h->size)
      return refused("RowAttention: cosines and sines are not [positions, at most size / 2]");
    h->rotated = 2 * cosines.sizes[1];
    if (cosines.sizes[0] < longest) longest = cosines.sizes[0];
  }
  const int64_t own = h->heads * h->size, kv = h->kv_heads * h->size;
  a.query_step = a.key ? own : own + 2 * kv;
  a.kv_step = a.key ? kv : a.query_step;
  if (query.count == 0 || query.sizes[query.count - 1] != a.query_step) return refused("RowAttention: query");
  const int64_t tokens = elements(query) / a.query_step;
  if (a.key && (!a.value || elements(key) != tokens * kv || elements(value) != tokens * kv))
    return refused("RowAttention: key or value");
  if (!a.key) {
    a.key = a.query + own;
    a.value = a.key + kv;
  }
  Token *made = thread_buffer(0, (size_t)tokens * sizeof *made);
  if (!made) return CreateStatus(ORT_FAIL, "RowAttention: no memory");
  if (calls.count != 2 || calls.sizes[1] != WORDS_OF_CALL ||
      places(told, calls.sizes[0], keys.sizes[0], longest, tokens, made) != tokens)
    return refused("RowAttention: calls");
  a.tokens = made;
  query.sizes[query.count - 1] = own;
  TRY(output(context, query, &a.out));
  if (calls.sizes[0] < tokens) TRY(KernelContext_ParallelFor(context, keep_part, (size_t)tokens, 0, &a));
  TRY(KernelContext_ParallelFor(context, read_part, (size_t)(tokens * h->kv_heads), 0, &a));
  return a.failed ? CreateStatus(ORT_FAIL, "RowAttention: no memory") : NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *given, const OrtKernelInfo *info, void **kernel) {
  (void)op, (void)given;
  Heads heads = {0};
  TRY(KernelInfoGetAttribute_int64(info, "num_heads", &heads.heads));
  TRY(KernelInfoGetAttribute_int64(info, "kv_num_heads", &heads.kv_heads));
  TRY(KernelInfoGetAttribute_int64(info, "local_window_size", &heads.window));
  TRY(KernelInfoGetAttribute_float(info, "scale", &heads.scale));
  if (heads.heads < 1 || heads.heads > MOST_HEADS || heads.kv_heads < 1 || heads.heads % heads.kv_heads)
    return refused("RowAttention: num_heads, kv_num_heads");
  Heads *made = malloc(sizeof *made);
  if (!made) return CreateStatus(ORT_FAIL, "RowAttention: no memory");
  *made = heads;
  *kernel = made;
  return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "RowAttention"; }
static int type(const OrtCustomOp *op, size_t at) { return (void)op, at == CALLS ? ORT_INT64 : ORT_FLOAT; }
static size_t inputs(const OrtCustomOp *op) { return (void)op, INPUTS; }
static int optional(const OrtCustomOp *op, size_t at) {
  return (void)op, at == KEY || at == VALUE || at == COSINES || at == SINES;
}

const OrtCustomOp row_attention = {
    OP_COMMON,
    .GetName = name,
    .GetInputType = type,
    .GetInputTypeCount = inputs,
    .GetInputCharacteristic = optional,
    .CreateKernelV2 = create,
    .KernelComputeV2 = attend,
    .KernelDestroy = free,
};
