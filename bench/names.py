#!/usr/bin/env python3
"""Many names in one text: which of them are not told apart?

Hides --names keys by name at random places of a text and asks for --asks of them. Prints how many were answered right, by
how many facts have digits in the block of the asked one and by where blocks cut its fact; and of the wrong answers which
block had most of the attention: the right one, or one whose name shares letters with the asked name (beside it, what two
names share by chance).

    bench/names.py --text PATH [--tokens 65536] [--names 1001] [--asks 100] [--model GGUF] [--cairn build/cairn] [--seed 1]
                   [--dir DIR]

--text is a file, or a directory: then 64 KiB pieces of its files, drawn by --seed. The model must read bytes.
"""
import collections, os, random, string, sys, tempfile

sys.dont_write_bytecode = True
import driver

ap = driver.recall_arguments(__doc__, tokens=65536, seed=1)
ap.add_argument("--names", type=int, default=1001)
ap.add_argument("--asks", type=int, default=100)
opt = ap.parse_args()
rng = random.Random(opt.seed)
rest = opt.tokens - 1 - opt.names * len(driver.says("12345", "ABCD"))  # BOS is a token too
if rest < 0 or opt.asks > opt.names:
    sys.exit(f"{opt.names} names do not fit into {opt.tokens:,} tokens, or are fewer than {opt.asks} questions")
other = driver.text(opt.text, rest, rng)
if len(other) < rest:
    sys.exit(f"'{opt.text}' is too short: {rest:,} bytes are needed")

names = set()
while len(names) < opt.names:
    names.add(driver.draw(rng, string.ascii_uppercase, 4))
names = rng.sample(sorted(names), opt.names)
keys = {name: driver.draw(rng, string.digits, 5) for name in names}
text, at, read = b"", {}, 0
for name, place in zip(names, sorted(rng.randrange(rest + 1) for _ in names)):
    text += other[read:place]
    at[name], read = len(text), place
    text += driver.says(keys[name], name).encode()
text += other[read:]


def cut(name, C):
    """Block of the digits, and where a fact is cut by blocks of C: tokens are BOS and the bytes."""
    said = driver.says(keys[name], name)
    begin, digits = 1 + at[name] + said.index(name), 1 + at[name] + said.index(keys[name])
    blocks = [begin // C, (begin + 3) // C, digits // C, (digits + 4) // C]
    where = ("in its name", "between", "in its digits")
    return blocks[2], next((w for w, a, b in zip(where, blocks, blocks[1:]) if a != b), "nowhere")


shared = lambda a, b: sum((collections.Counter(a) & collections.Counter(b)).values())
in_place = lambda a, b: sum(x == y for x, y in zip(a, b))

with tempfile.TemporaryDirectory(prefix="cairn-names.", dir=opt.dir) as work:
    store = os.path.join(work, "store")
    with open(os.path.join(work, "text"), "wb") as f:
        f.write(text)
    driver.cairn(opt.cairn, "ingest", store, "-m", opt.model, "-c", "text", os.path.join(work, "text"))
    C = driver.cairn(opt.cairn, "stat", store)["geometry"]["block_tokens"]
    home = {name: cut(name, C)[0] for name in names}
    dwell = collections.defaultdict(list)
    for name in names:
        dwell[home[name]].append(name)
    by_company, by_cut, winners = collections.defaultdict(list), collections.defaultdict(list), []
    for name in rng.sample(names, opt.asks):
        answer = driver.cairn(opt.cairn, "ask", store, "-m", opt.model, "-c", "text", "-n", "5", "--sources=16", driver.asks(name))
        right = answer["answer"].strip()[:5] == keys[name]
        by_company[len(dwell[home[name]])].append(right)
        by_cut[cut(name, C)[1]].append(right)
        blocks = [s["token"] // C for s in answer["sources"]]
        best = next((b for b in blocks if dwell[b]), None)
        if not right and best is not None:
            winners.append((best == home[name], max(dwell[best], key=lambda n: shared(n, name)), name))

print(f"{os.path.basename(opt.model)}, {opt.names:,} names in {opt.tokens:,} tokens: "
      f"{sum(map(sum, by_cut.values()))} of {opt.asks} right\n")
print("| | right |\n|---|---|")
for n in sorted(by_company):
    print(f"| {n} {'fact has' if n == 1 else 'facts have'} digits in the block | {sum(by_company[n])} of {len(by_company[n])} |")
for where in sorted(by_cut):
    print(f"| cut {where} | {sum(by_cut[where])} of {len(by_cut[where])} |")
wrong = [(w, n) for own, w, n in winners if not own]
pairs = [(rng.choice(names), rng.choice(names)) for _ in range(10000)]
mean = lambda of, some: sum(of(a, b) for a, b in some) / max(1, len(some))
print(f"\nOf {len(winners)} wrong answers {len(winners) - len(wrong)} had most of the attention on the right block. The others' block"
      f" has a name that shares {mean(shared, wrong):.2f} letters\nwith the asked one, {mean(in_place, wrong):.2f} of them in the same"
      f" place; two names by chance {mean(shared, pairs):.2f} and {mean(in_place, pairs):.2f}.")
