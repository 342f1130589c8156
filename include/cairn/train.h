/* train.h - texts to learn from, recall tasks, and the trainer of landmark models.
 *
 * A corpus is files as bytes, in two splits that share no byte. A recall task hides sentences in its text and asks for
 * them: the paper's pass key, and keys by name among other names (docs/training.md). Training and evaluation draw from
 * the same sentences through different streams of random numbers: no evaluation seed gives a text that was trained on.
 *
 * The trainer runs stages one after the other, writes a checkpoint now and then, and goes on from one bit for bit. The
 * same seed and number of threads give the same model on the same kind of processor.
 *
 * Threads: a corpus may be shared by threads; a trainer belongs to one, and runs workers of its own.
 */
#ifndef CAIRN_TRAIN_H
#define CAIRN_TRAIN_H

#include <cairn/model.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- texts ---- */

typedef struct cairn_corpus cairn_corpus; /* open / close: mapped files */
typedef enum cairn_split { CAIRN_SPLIT_TRAIN, CAIRN_SPLIT_HELD_OUT } cairn_split;

/* Files and directories (all regular files below, in the order of their paths). Every 64 KiB of the stream they make
 * belongs to one split, by a hash of its position: about `held_out` of them (0..1) are held out. INVALID if there is no
 * byte in a split that should have some; NOT_FOUND / IO names the path. Files must not be cut short while it is open.
 */
CAIRN_API cairn_status cairn_corpus_open(const char *const *paths, size_t n, double held_out, cairn_corpus **out);
CAIRN_API void cairn_corpus_close(cairn_corpus *corpus);
CAIRN_API uint64_t cairn_corpus_bytes(const cairn_corpus *corpus, cairn_split split);
CAIRN_API size_t cairn_corpus_files(const cairn_corpus *corpus);
/* Bytes [at, at + bytes) of a split, whose end is followed by its begin. INVALID if it is empty. */
CAIRN_API cairn_status cairn_corpus_read(const cairn_corpus *corpus, cairn_split split, uint64_t at, size_t bytes,
                                         void *out);

/* ---- recall: a text with keys hidden in it, and questions ---- */

enum { CAIRN_RECALL_DIGITS = 5, CAIRN_RECALL_NAME = 4 };

typedef struct cairn_recall_options {
    size_t struct_size;
    uint64_t bytes;       /* of the text; a question comes on top */
    uint32_t distractors; /* names that are not asked for first; with `plain` every name is one */
    bool plain;           /* "The pass key is N." among the names; else the key asked for has a name too */
    double depth;         /* where the key asked for stands, 0 = at the begin, 1 = at the end; < 0 = drawn */
    uint64_t seed;
} cairn_recall_options;
CAIRN_API void cairn_recall_options_init(cairn_recall_options *opt, size_t struct_size);

typedef struct cairn_recall_question {
    char text[80];                        /* ends where the digits begin */
    char answer[CAIRN_RECALL_DIGITS + 1]; /* 0-terminated */
    char name[CAIRN_RECALL_NAME + 1];     /* "" for the plain key */
    uint64_t at;                          /* where its sentence begins in the text */
} cairn_recall_question;

typedef struct cairn_recall_text cairn_recall_text; /* new / free */
/* Held-out text with the sentences in it. The first question is for the key at `depth`; those for the distractors
 * follow, in order of their places. INVALID if the sentences do not fit into the text. */
CAIRN_API cairn_status cairn_recall_text_new(const cairn_corpus *corpus, const cairn_recall_options *opt,
                                             cairn_recall_text **out);
CAIRN_API void cairn_recall_text_free(cairn_recall_text *text);
CAIRN_API const char *cairn_recall_text_bytes(const cairn_recall_text *text, size_t *bytes); /* 0-terminated too */
CAIRN_API size_t cairn_recall_text_questions(const cairn_recall_text *text);
CAIRN_API const cairn_recall_question *cairn_recall_text_question(const cairn_recall_text *text, size_t i);

/* ---- stages: what is learnt, in which steps ---- */

/* One update is made of `windows` windows of `window` slots. Shares are of windows, 0..1. A window is one of: facts and
 * the same facts again, with little in between (`dense`); nothing but the corpus (`text`); else facts and questions
 * hidden in text. Learning rates rise over `warmup` updates, then follow half a cosine down to `floor` times theirs. */
typedef struct cairn_train_stage {
    char name[32];
    uint64_t steps;
    uint32_t window;
    uint32_t windows;
    uint32_t warmup;
    float adam, muon; /* learning rates; muon 0: AdamW for the matrices too */
    float floor;
    float dense, text;
    uint32_t facts, questions; /* of a window, at most */
    float plain;               /* share of windows with a plain key; a third of their questions ask for it */
    float said;                /* share of questions by name that are the fact said again, not asked */
    float interleaved;         /* share with questions anywhere after their facts, not all at the end */
    float short_form;          /* of dense windows: "ABCD is 12345." */
    float grass, numbers;      /* shares of fillings that are the paper's sentences about grass, or rows of numbers */
    float text_weight;         /* of filling in the loss; a digit of an answer weighs answer_weight, the first thrice */
    float answer_weight;
    float guide;          /* weight of guidance (docs/training.md) beside those, 0 = none: no distractors either */
    uint32_t distractors; /* blocks of earlier windows that a guided row sees beside its own window, at most 16 */
    uint32_t rivals;      /* remembered landmark keys that compete, the newest; 0 = all */
    float cut;            /* share of facts hidden in text that are moved so that a block ends in their digits or just
                             before them, which chance does to one in eight (63 bytes a block; places are in bytes) */
    float alike;          /* share of the names hidden in text that are another one of their window with two letters
                             changed for each other, or one for a new one */
} cairn_train_stage;
CAIRN_API void cairn_train_stage_init(cairn_train_stage *stage); /* text alone, at rates known to train */

/* ---- the trainer ---- */

/* How rows attend while a model is trained. DENSE: to every row of the window before them, an ordinary model. XL: to
 * their segment and the one before, as Transformer-XL (Dai et al. 2019): no gradient into the one before. */
typedef enum cairn_train_attention { CAIRN_TRAIN_LANDMARK, CAIRN_TRAIN_DENSE, CAIRN_TRAIN_XL } cairn_train_attention;

/* What the operands of matrix products are rounded to; sums, parameters and all else are f32. BF16 needs AMX: a run of
 * AUTO is the same again where AMX is, or is not, as before. */
typedef enum cairn_train_products { CAIRN_TRAIN_AUTO, CAIRN_TRAIN_F32, CAIRN_TRAIN_BF16 } cairn_train_products;

typedef struct cairn_trainer cairn_trainer; /* new / free: parameters, moments, workers */

typedef struct cairn_trainer_options {
    size_t struct_size;
    uint64_t seed;
    uint32_t threads; /* workers; 0 = one per core. Part of what makes a run the same again */
    /* the model: bytes in, RMSNorm, QK-norm, RoPE, SwiGLU, landmarks at clamped positions (architecture "qwen3") */
    uint32_t width, layers, heads, kv_heads, head_dim, hidden;
    uint32_t block_tokens, clamp_blocks, window_blocks, top_k;
    uint32_t local_layers, local_window_blocks; /* the first layers never retrieve: their landmark keys are all alike */
    cairn_train_attention attention;            /* LANDMARK; DENSE and XL leave the two lines above out */
    uint32_t segment;                           /* slots of a segment of XL */
    /* guidance, where a stage has a weight for it */
    uint32_t guided_layer, guided_heads; /* the first heads of layers from this one on */
    uint32_t guided_apart;               /* 1: even heads to what is first in a block, odd ones to what comes later */
    uint32_t remembered;                 /* landmark keys of earlier windows that compete */
    uint32_t kept_blocks;                /* of earlier windows, for distractors: those with a plain key are left out */
    float rope_theta; /* above 0. Pair i of D / 2 turns by theta^(-2 i / D) a slot; those that turn far within the clamp
                         cannot tell what a block holds */
    cairn_train_products products; /* AUTO: BF16 where it can be */
} cairn_trainer_options;
CAIRN_API void cairn_trainer_options_init(cairn_trainer_options *opt, size_t struct_size);

/* A new model of the options' shape, or, with `source`, one of that shape that begins with its weights: a model without
 * landmarks is given the options' (a token more, its rows the mean of all others, as the paper did to LLaMA), one that
 * has landmarks keeps its own. Its tokenizer is used and kept. Stages are copied, corpus and source borrowed. INVALID
 * names what cannot be: a window that is no whole number of blocks or longer than the training text, a share outside
 * 0..1, ...; UNSUPPORTED: BF16 without AMX. */
CAIRN_API cairn_status cairn_trainer_new(const cairn_trainer_options *opt, const cairn_model *source,
                                         const cairn_corpus *corpus, const cairn_train_stage *stages, size_t n,
                                         cairn_trainer **out);
CAIRN_API void cairn_trainer_free(cairn_trainer *trainer);

typedef struct cairn_train_report { /* of one update, or of several added up */
    uint64_t step;                  /* updates done so far, of `steps` */
    uint64_t steps;
    size_t stage;
    uint64_t tokens;   /* content tokens of the windows */
    double norm;       /* of the gradient, before it was clipped: the largest */
    double pace;       /* of the learning rates, 0..1: the last */
    double text_nats;  /* -ln p summed over filling, `text_tokens` of it */
    double digit_nats; /* the same over digits of answers */
    double guide_nats; /* -ln of the gates' share, over guided rows and heads */
    uint64_t text_tokens, digits, guided;
    uint64_t plain, plain_right, named, named_right; /* answers, and those with every digit the likeliest */
} cairn_train_report;

/* One update. NOT_FOUND: all stages are done. INVALID: the loss is not finite; it names the step, and the parameters
 * are those before it. *report is written. */
CAIRN_API cairn_status cairn_trainer_step(cairn_trainer *trainer, cairn_train_report *report);
/* Adds `one` to `sum`. */
CAIRN_API void cairn_train_report_add(cairn_train_report *sum, const cairn_train_report *one);

/* All that is needed to go on bit for bit; the file appears whole or not at all, and the old one stays until then. */
CAIRN_API cairn_status cairn_trainer_save(const cairn_trainer *trainer, const char *path);
/* Into a trainer of the same options and stages. MISMATCH names what differs (`other_stages`: not the stages), CORRUPT
 * a damaged file. */
CAIRN_API cairn_status cairn_trainer_load(cairn_trainer *trainer, const char *path, bool other_stages);
/* Writes the model as it is now; one that came from a source keeps its name and all else it said. */
CAIRN_API cairn_status cairn_trainer_export(const cairn_trainer *trainer, const char *name, cairn_gguf_type type,
                                            const char *path);
CAIRN_API uint64_t cairn_trainer_parameters(const cairn_trainer *trainer);
CAIRN_API uint32_t cairn_trainer_threads(const cairn_trainer *trainer);
CAIRN_API cairn_train_products cairn_trainer_products(const cairn_trainer *trainer); /* F32 or BF16 */

/* ---- what a trained model says ---- */

/* nats (n - 1): -ln p of tokens 1..n-1, each after all before it, by the trainer's own forward over one window of n.
 * For models without landmarks: an ordinary one, and one trained as Transformer-XL over segments of cairn.xl.segment,
 * which no session computes. UNSUPPORTED for a landmark model: a session is what it is used with. Memory grows with n.
 */
CAIRN_API cairn_status cairn_train_score(const cairn_model *model, const cairn_token *tokens, size_t n, double *nats);

#ifdef __cplusplus
}
#endif
#endif
