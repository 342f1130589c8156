#!/usr/bin/env python3
"""The paper's third result at our scale: an ordinary model trained over a window W is given landmarks and trained on for
at most a tenth of its tokens; then both are asked for pass keys in texts of W to 64 W tokens and beyond.

The first model has ordinary attention and has learnt recall tasks inside its window. The second begins with its weights
(`cairn train --init`). Both learn from the same text and are asked the same questions (`cairn bench passkey`). Goes on
where it stopped when run again with the same --dir. Prints Markdown.

    bench/extend.py --corpus DIR --dir DIR [--cairn build/cairn] [--steps 900] [--tenth 0.1] [--texts 20] [--far 128,256]
                    [--quick]

With the defaults about 40 minutes on two cores; --quick trains for seconds, to see that all runs.
"""
import argparse, os

from driver import cairn, kept, root, train as train_plan

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--corpus", required=True, help="tools/corpus.sh makes one")
ap.add_argument("--dir", required=True, help="where models, logs and figures are kept")
ap.add_argument("--steps", type=int, default=900, help="of the last stage of the ordinary model")
ap.add_argument("--tenth", type=float, default=0.1, help="tokens of the second training, as a share of the first's")
ap.add_argument("--texts", type=int, default=20, help="of each length")
ap.add_argument("--far", default="128,256", help="multiples of W that the landmark model alone is asked at")
ap.add_argument("--quick", action="store_true")
opt = ap.parse_args()
W, BLOCK = 512, 64
lengths = [W << i for i in range(3 if opt.quick else 7)]
far = [] if opt.quick else [W * int(x) for x in opt.far.split(",") if x]
if opt.quick:
    opt.texts = 2
os.makedirs(opt.dir, exist_ok=True)


def train(name, model, stages, *more):
    return train_plan(opt.cairn, opt.dir, name, model, stages, opt.corpus, *more)[0] + ".gguf"


def tokens(stages, plain):
    """Of text: of a window's slots those that are no landmarks."""
    return sum(s["steps"] * s["windows"] * (s["window"] if plain else s["window"] // BLOCK * (BLOCK - 1)) for s in stages)


def ask(model, length):
    """Right of asked; figures are kept in a file each."""
    cell = kept(f"{model}-{opt.texts}-{length}.figures",
                lambda: cairn(opt.cairn, "bench", "passkey", "-m", model, "-c", opt.corpus, "--tokens", length, "--texts",
                              opt.texts, "--seed", 21))["cells"][0]
    return f"{cell['right']}/{cell['asked']}"


shape = {"width": 192, "layers": 4, "heads": 3, "kv_heads": 3, "head_dim": 64, "hidden": 512, "rope_theta": 1000000,
         "seed": 1, "threads": 2}
lesson = {"text": 0, "short_form": 0.5, "plain": 0.6, "said": 0.3, "interleaved": 0.5, "grass": 0.05, "numbers": 0.05,
          "text_weight": 0.3, "answer_weight": 5}
few = opt.quick
first = [{"name": "copy", "steps": 2 if few else 120, "window": 256, "windows": 16, "warmup": 20, "adam": 0.002,
          "muon": 0.02, "floor": 1, "dense": 1, "facts": 2, "questions": 3, **lesson},
         {"name": "find", "steps": 2 if few else 200, "window": 256, "windows": 16, "dense": 0.3},
         {"name": "window", "steps": 20 if few else opt.steps, "window": W, "windows": 8, "floor": 0.02, "dense": 0.1,
          "facts": 6, "questions": 6, "text": 0.1}]
ordinary = train("ordinary", {**shape, "attention": "dense"}, first)
seen = tokens(first, True)
steps = max(1, int(seen * opt.tenth) // (8 * W // BLOCK * (BLOCK - 1)))
second = [{"name": "landmarks", "steps": steps, "window": W, "windows": 8, "warmup": 10, "adam": 0.001, "muon": 0.01,
           "floor": 0.05, "dense": 0.3, "facts": 4, "questions": 6, "guide": 0.5, **lesson, "numbers": 0.15}]
landmarks = train("landmarks", {**shape, "attention": "landmark", "block_tokens": BLOCK - 1, "clamp_blocks": 3,
                                "window_blocks": 1, "top_k": 4, "local_layers": 1, "local_window_blocks": 1,
                                "guided_layer": 2, "guided_heads": 2, "remembered": 2048},
                  second, "--init", ordinary)
more = tokens(second, False)
print(f"window W = {W} slots; ordinary model: {seen:,} tokens; with landmarks: {more:,} more ({100 * more / seen:.1f} %)\n")
print("| tokens | of W | ordinary | with landmarks, k = 4 |\n|---|---|---|---|", flush=True)
for length in lengths + far:
    left = ask(ordinary, length) if length in lengths else "-"
    print(f"| {length:,} | {length // W} | {left} | {ask(landmarks, length)} |", flush=True)
