#!/usr/bin/env python3
"""The paper's Tables 1 and 2 at our scale: one shape, the same text and training tokens, three kinds of attention.

Trains an ordinary model over a window W, a Transformer-XL over segments of W/2 with a memory of W/2, and a landmark model
over W, once per seed, and measures bits per byte of held-out text at lengths W, 4W and 8W (`cairn bench ppl`), with the
number of tokens a row attends to. All three see the same windows of text, eight of them an update (with four and higher
rates what a run came to hung on its seed). Training and measuring go on where they stopped when the command is run again
with the same --dir. Prints Markdown: means over seeds, and half the distance of the extremes.

    bench/paper.py --corpus DIR --dir DIR [--cairn build/cairn] [--seeds 1,2,3] [--window 512] [--tokens 12000000]
                   [--landmark-window 512] [--bytes 200000] [--width 128] [--layers 4] [--jobs 2] [--quick]

With the defaults two hours of one core with AMX: --jobs models are trained and measured at once, each on one thread.
With --landmark-window the landmark models are trained over longer windows, fewer of them an update: as many tokens.
--quick trains 200,000 tokens of a small model with one seed, to see that all runs. Table 2 asks the landmark models again,
with one choice of blocks for each row and head, for each head, for each row (--scope).
"""
import argparse, concurrent.futures, os, statistics, sys

from driver import cairn, kept, root, train as train_plan

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--corpus", required=True, help="tools/corpus.sh makes one")
ap.add_argument("--dir", required=True, help="where models, logs and figures are kept")
ap.add_argument("--seeds", default="1,2,3")
ap.add_argument("--window", type=int, default=512, help="W in slots, a multiple of 128")
ap.add_argument("--landmark-window", type=int, help="in training, W times 1, 2, 4 or 8 (W)")
ap.add_argument("--tokens", type=int, default=12_000_000, help="of training, for each model")
ap.add_argument("--bytes", type=int, default=200_000, help="of held-out text, for each figure")
ap.add_argument("--width", type=int, default=128)
ap.add_argument("--layers", type=int, default=4)
ap.add_argument("--jobs", type=int, default=2, help="models at once, a thread each")
ap.add_argument("--quick", action="store_true")
opt = ap.parse_args()
if opt.quick:
    opt.seeds, opt.tokens, opt.bytes, opt.width, opt.layers = "1", 200_000, 16_000, 64, 2
if opt.window % 128 != 0:
    sys.exit("--window must be a multiple of 128: whole blocks of 64, and whole segments of half of it")
W, WINDOWS = opt.window, 8  # of an update
LONG = (opt.landmark_window or W) // W  # times W
if LONG not in (1, 2, 4, 8) or LONG * W != (opt.landmark_window or W):
    sys.exit("--landmark-window must be W times 1, 2, 4 or 8")
os.makedirs(opt.dir, exist_ok=True)


def train(attention, seed):
    """The model of one kind and seed."""
    landmark = attention == "landmark"
    content = W * 63 // 64 if landmark else W  # landmarks are no text
    long = LONG if landmark else 1
    model = {"width": opt.width, "layers": opt.layers, "heads": opt.width // 32, "kv_heads": opt.width // 32, "head_dim": 32,
             "hidden": opt.width * 8 // 3 // 16 * 16, "rope_theta": 1_000_000, "attention": attention, "segment": W // 2,
             "seed": seed, "threads": 1, "guided_layer": 1}
    stages = [{"name": "text", "steps": max(1, opt.tokens // (content * WINDOWS)), "window": long * W, "windows": WINDOWS // long,
               "warmup": 50, "text": 1, "adam": 0.004, "muon": 0.02, "floor": 0.02}]
    name, done = train_plan(opt.cairn, opt.dir, f"{attention}{long * W if long > 1 else ''}-{seed}", model, stages, opt.corpus)
    print(f"{attention}, seed {seed}: {done['step']} updates", file=sys.stderr, flush=True)
    return name


def bits(name, length, k=None, window=None, scope=None):
    """Bits per byte and attended tokens of a model at a length; figures are kept in a file each."""
    label = "-".join(str(x) for x in ("ppl", opt.bytes, length, k, window, scope) if x is not None)
    extra = []
    for flag, value in (("--top-k", k), ("--window", window), ("--scope", scope)):
        extra += [flag, value] if value is not None else []
    cell = kept(f"{name}-{label.replace('+', '')}.figures",
                lambda: cairn(opt.cairn, "bench", "ppl", "-m", name + ".gguf", "-c", opt.corpus, "--length", length, "--texts",
                              max(1, opt.bytes // max(length, W)), "--threads", 1, *extra))["cells"][0]
    return cell["bits_per_byte"], cell["attended_tokens"]


def rows(title, cells):
    """A table: each cell is (columns, length, names of models, how they are asked)."""
    print(title, flush=True)
    asked = [[pool.submit(bits, n, length, **how) for n in names] for _, length, names, how in cells]
    for (columns, _, _, _), got in zip(cells, asked):
        got = [g.result() for g in got]
        values = [g[0] for g in got]
        print(f"| {columns} | {statistics.mean(g[1] for g in got):.0f} | {statistics.mean(values):.4f} | "
              f"{(max(values) - min(values)) / 2:.4f} |", flush=True)


seeds = [int(s) for s in opt.seeds.split(",")]
KINDS = ("dense", "xl", "landmark")
pool = concurrent.futures.ThreadPoolExecutor(opt.jobs)
training = {(a, s): pool.submit(train, a, s) for s in seeds for a in KINDS}  # a seed of all kinds before the next seed
dense, xl, landmark = ([training[a, s].result() for s in seeds] for a in KINDS)
print(f"shape: width {opt.width}, {opt.layers} layers, window {W}; {opt.tokens:,} training tokens; seeds {opt.seeds}; "
      f"{opt.bytes:,} bytes of held-out text a figure\n")
table = [(f"dense, window {length} | {length}", length, dense, {}) for length in (W * 11 // 16, W)]
table += [(f"Transformer-XL, {W // 2} + {W // 2} | {length}", length, xl, {}) for length in (W, 4 * W, 8 * W)]
table += [(f"landmark, own and {window} blocks, k = {k}{', by head' if scope else ''} | {length}", length, landmark,
           {"k": k, "window": window, "scope": scope})
          for length in (W, 4 * W, 8 * W)
          for window, k, scope in ((3, 2, None), (3, 4, None), (1, 4, None), (5, 2, None), (4, 1, "head"), (3, 0, None))]
rows("| model | length | attended | bits/byte | +- |\n|---|---|---|---|---|", table)
rows("\n| scope | length | local blocks, k | attended | bits/byte | +- |\n|---|---|---|---|---|---|",
     [(f"{scope} | {length} | own and {window}, {k}", length, landmark, {"k": k, "window": window, "scope": scope})
      for length in (4 * W, 8 * W) for window, k in ((3, 2), (3, 4), (4, 1)) for scope in ("token+head", "head", "token")])
