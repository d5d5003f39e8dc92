// What Python hands to the evaluator, and the entry points that every instruction set offers.
//
// The order and the types of the fields are repeated in intlm/engine/native.py, which fills them.
#pragma once
#include <cstdint>

enum Estimator { PLAIN, ACTIVATION, WEIGHT };

// In the order of intlm.model.TRAINED.
enum Parameter {
  EMBEDDING, HEAD, NORM_OUTPUT, GATE_INPUT, GATE_RECURRENT, CANDIDATE_INPUT, CANDIDATE_RECURRENT,
  MLP_IN, MLP_OUT, NORM_RECURRENT, NORM_MLP, GATE_BIAS, CANDIDATE_BIAS, PARAMETERS
};

// In the order of intlm.eggroll.SITES.
enum Site { SITE_EMBEDDING, SITE_GATE, SITE_CANDIDATE, SITE_MLP_IN, SITE_MLP_OUT, SITE_HEAD, SITES };

struct ModelJob {
  int32_t width, layers, vocabulary;
  int32_t kind[3];                      // gate, candidate, mlp: 0 table, 1 identity, 2 doubled ReLU
  const int8_t *activation[3];          // tables [256], at v + 128
  const int32_t *exp2, *log2, *reciprocal;
  const int8_t *gaussian;
  const int8_t *parameter[PARAMETERS];  // as in intlm/model.py, layers stacked
  const int16_t *head_bias;             // [V]
};

struct StepJob {
  int32_t estimator, rows, tokens;      // pairs and T; PLAIN: rows of text and tokens
  int32_t rank;                         // of each matrix; ACTIVATION: of the head
  int32_t gaussian_noise, sign_fitness, sigma_weight, sigma_norm, mean_difference, threads;
  int32_t site_shift[SITE_HEAD];        // log2 of a site's perturbation of its accumulator; the head has none
  uint32_t first_pair, key[2];          // key of the step
  const int32_t *horizon;               // k: [PARAMETERS, L]
  const int32_t *shift;                 // of B: [PARAMETERS, L]
  const int32_t *text;                  // [rows, T + 1]; PLAIN with logits: [rows, T]
  const int8_t *state;                  // [rows, L, D]
  int8_t *state_after;                  // [rows, L, D]
  int32_t *votes[PARAMETERS];           // of each parameter's shape; all null: the members are scored alone
  const int8_t *voters;                 // WEIGHT: q of each pair, [rows]: no member is run, and each parameter whose
                                        // `votes` is given is voted for; the embedding's needs `text`
  int64_t *square;                      // [PARAMETERS, L]: sums of B^2; WEIGHT: sum of q^2 first
  int64_t *counts;                      // score, difference, ties, saturated, seen
  int8_t *fitness;                      // WEIGHT: q of each pair, [rows]
  int16_t *logits;                      // PLAIN: [rows, T, V], or null for
  int32_t *likelihood;                  // the logarithms of what each token that follows is given, [rows, T]
};

struct UpdateJob {
  int32_t threshold, threads, stride;   // of `multiple` and `unit`, between parameters
  int32_t layers[PARAMETERS];           // 1 where a parameter has none
  uint32_t root[2], step;               // of the key that comes next
  uint32_t *key;
  int64_t size[PARAMETERS];             // numbers in a layer
  int64_t white_inputs[PARAMETERS];     // K where votes are whitened in blocks of 64 inputs, or 0
  const int64_t *multiple, *unit;       // [PARAMETERS, L]
  const int32_t *covariance;            // [blocks, 64, 64], as those that follow
  int32_t *covariance_after;
  const int16_t *inverse;               // null: nothing is whitened
  int16_t *inverse_after;               // null: it is not due
  const int32_t *votes;                 // one parameter after the other, as all that follow
  const int16_t *master;
  int16_t *after;
  int8_t *weight;
};

struct SampleJob {
  const int32_t *weight;                // by the distance below the likeliest logit, [4095], not rising; 0 to 2^24
  int32_t top_k, top_p;                 // 1 to 65536; Q16
  uint32_t key[2], sample, position;    // of the noise; the number of the stream; tokens drawn before
  const int32_t *text;                  // [tokens]: read before the first draw; at least one
  int32_t tokens, count;                // the last token drawn is not read: it is the next call's text
  int8_t *state;                        // [L, D], before and after
  int32_t *drawn;                       // [count]
  const int16_t *logits;                // [count, V]: where given, one token for each of `count` samples is drawn from
                                        // these, and nothing is read
};

// An evaluator holds a model, its weights as the kernels read them, and memory for its calls, which are made one at
// a time; so does a sampler. `read` takes a model over; `read`, `run` and `update` return 0, or 1 where memory ran out.
extern "C" {
#define INTLM_DECLARE(isa)                                     \
  void *intlm_new_##isa(void);                                 \
  void intlm_free_##isa(void *);                               \
  int intlm_read_##isa(void *, const ModelJob *);              \
  int intlm_run_##isa(void *, const StepJob *);                \
  int intlm_update_##isa(const UpdateJob *);                   \
  void *intlm_sampler_new_##isa(void);                         \
  void intlm_sampler_free_##isa(void *);                       \
  int intlm_sampler_read_##isa(void *, const ModelJob *);      \
  int intlm_sampler_run_##isa(void *, const SampleJob *);
INTLM_DECLARE(scalar)
INTLM_DECLARE(avx2)
INTLM_DECLARE(avx512)
INTLM_DECLARE(amx)
int intlm_isas(void);    // a bit for each instruction set that this processor and this build have: 1, 2, 4, 8
int64_t intlm_layout(void);  // what the Python side has to agree with
}
