#!/usr/bin/env python3
"""Many keys against one long text that is read once: does the right block win, and is it read right?

Each key is said in a context of its own, 600 to 1,800 bytes of other text, that is attached to the long one when it is asked
for (`cairn ask -c hay,key`), so that its blocks compete with all of the long text's. Half of the keys are plain, half have
names. Prints how many were answered right and which share of the attention their own text had, when right and when wrong:
a wrong answer with most of the attention on its text was found and misread.

    bench/needles.py --text PATH [--tokens 262144] [--keys 60] [--model GGUF] [--cairn build/cairn] [--seed 7] [--dir DIR]
    bench/needles.py --text PATH --store STORE --context NAME ...

--text is a file, or a directory: then 64 KiB pieces of its files, drawn by --seed. The text for the keys is what follows the
first --tokens bytes, 200,000 bytes of it. With --store the long text is a context that is there already; what is added to the
store is dropped again.
"""
import os, random, statistics, string, sys, tempfile

sys.dont_write_bytecode = True
import driver

ap = driver.recall_arguments(__doc__, tokens=262144, seed=7)
ap.add_argument("--keys", type=int, default=60)
ap.add_argument("--store")
ap.add_argument("--context")
opt = ap.parse_args()
if (opt.store is None) != (opt.context is None):
    sys.exit("--store and --context go together")
rng = random.Random(opt.seed)
long = 0 if opt.store else opt.tokens - 1  # and BOS
text = driver.text(opt.text, long + 200000, rng)
hay, other = text[:long], text[long:]
if len(other) < 20000 or len(hay) < long:
    sys.exit(f"'{opt.text}' is too short: {opt.tokens:,} bytes and 20,000 more for the keys' own texts are needed")


def ask(store, book, work, plain, n):
    """A key's text is written, asked for, dropped: (right, share of the attention on its text)."""
    name, key = driver.draw(rng, string.ascii_uppercase, 4), driver.draw(rng, string.digits, 5)
    name = None if plain else name
    size = rng.randrange(600, 1800)
    begin = rng.randrange(len(other) - size)
    at = begin + rng.randrange(100, size - 100)
    path, context = os.path.join(work, "key"), f"needle {n}"
    with open(path, "wb") as f:
        f.write(other[begin:at] + driver.says(key, name).encode() + other[at:begin + size])
    common = (opt.cairn, "ingest", store, "-m", opt.model)
    driver.cairn(*common, "-c", context, path)
    answer = driver.cairn(opt.cairn, "ask", store, "-m", opt.model, "-c", f"{book},{context}", "-n", "5", "--sources=8",
                          driver.asks(name))
    driver.cairn(opt.cairn, "drop", store, context)
    return answer["answer"].strip()[:5] == key, sum(s["share"] for s in answer["sources"] if s["context"] == context)


with tempfile.TemporaryDirectory(prefix="cairn-needles.", dir=opt.dir) as work:
    store, book = opt.store or os.path.join(work, "store"), opt.context or "hay"
    if not opt.store:
        with open(os.path.join(work, "hay"), "wb") as f:
            f.write(hay)
        driver.cairn(opt.cairn, "ingest", store, "-m", opt.model, "-c", book, os.path.join(work, "hay"))
    tokens = next(c["tokens"] for c in driver.cairn(opt.cairn, "list", store)["contexts"] if c["name"] == book)
    asked = [(i % 2 == 0, *ask(store, book, work, i % 2 == 0, i)) for i in range(opt.keys)]

print(f"{os.path.basename(opt.model)}, {tokens:,} tokens\n")
print("| key | right | share of attention on its text, mean: right | wrong |\n|---|---|---|---|")
for plain in (True, False):
    share = {r: [s for p, right, s in asked if p == plain and right == r] for r in (True, False)}
    mean = lambda x: f"{statistics.mean(x):.2f}" if x else "-"
    print(f"| {'plain' if plain else 'by name'} | {len(share[True])}/{len(share[True]) + len(share[False])} | {mean(share[True])} | "
          f"{mean(share[False])} |")
