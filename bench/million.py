#!/usr/bin/env python3
"""A million tokens of real text as a persistent context, asked from new processes under a memory budget.

For each length (65,536 and 1,048,576 tokens by default) and each depth (10, 50, 90 %): a text with one plain pass key is
ingested into a store of its own with --fetch read --ram 256M, then asked by new processes, with the store's pages dropped
from the page cache (cold) and again (warm). Then eight texts are ingested separately, one of them holding a key, and asked
all at once. Prints a table (Markdown) and, with --json FILE, every figure. Peak memory is VmHWM; the budget it must stay
within is model + ram + 64 MiB. Stores are deleted as soon as they were asked.

    bench/million.py [--cairn build/cairn] [--dir DIR] [--tokens N,N] [--ram 256M] [--seed N] [--skip N] [--json FILE]

--skip N leaves out the first N bytes of tools/text.sh: 0 is the Jargon File, whose tables of numbers are hard on the tiny
model; from 1.7 million on it is a dictionary's prose (the default, 2,000,000).
"""
import argparse, json, os, platform, random, shutil, statistics, subprocess, sys, tempfile, time

sys.dont_write_bytecode = True
import driver

MIB = 1 << 20
root = driver.root
MODEL = os.path.join(root, "models", "cairn-tiny-f16.gguf")

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--dir", help="where texts and stores go (a temporary directory)")
ap.add_argument("--tokens", default="65536,1048576")
ap.add_argument("--depths", default="10,50,90")
ap.add_argument("--ram", default="256M")
ap.add_argument("--asks", type=int, default=5, help="processes per store, cold and warm each")
ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--skip", type=int, default=2000000)
ap.add_argument("--json")
ap.add_argument("--quick", action="store_true", help="one depth, two asks")
opt = ap.parse_args()
if opt.quick:
    opt.depths, opt.asks = "50", 2
rng = random.Random(opt.seed)
work = tempfile.mkdtemp(prefix="cairn-million.", dir=opt.dir)


def text(nbytes, depth, key, skip=0):
    """nbytes of real text with the key's sentence `depth` percent of the way in (no key: plain text)."""
    needle = driver.says(key).encode() if key else b""
    book = subprocess.run([os.path.join(root, "tools", "text.sh"), str(nbytes - len(needle)), str(skip)],
                          stdout=subprocess.PIPE, check=True).stdout
    at = len(book) * depth // 100
    path = os.path.join(work, "text")
    with open(path, "wb") as f:
        f.write(book[:at] + needle + book[at:])
    return path


def cairn(*args):
    return driver.cairn(opt.cairn, *args)


def ask(store, names, fetch, cold):
    if cold:
        driver.drop_cache(store)
    t = time.monotonic()
    out = cairn("ask", store, "-m", MODEL, "-c", names, "-n", "8", "--stop", ".", "--fetch", fetch, "--ram", opt.ram, driver.asks())
    out["wall_seconds"] = time.monotonic() - t
    return out


def median(asks, get):
    return statistics.median(get(a) for a in asks)


def size(text_):
    return int(text_[:-1]) << {"K": 10, "M": 20, "G": 30}[text_[-1]] if text_[-1] in "KMG" else int(text_)


budget = os.path.getsize(MODEL) + size(opt.ram) + 64 * MIB
cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
results = {"machine": f"{os.cpu_count()} x {cpu}", "ram": opt.ram, "budget_bytes": budget, "seed": opt.seed, "runs": []}
print(f"machine: {results['machine']}; --fetch read --ram {opt.ram}: budget model + ram + 64 MiB = {budget / MIB:.1f} MiB\n")
print("| tokens | depth | ingest tokens/s | ingest peak MiB | store MiB | right | first token cold / warm, s | "
      "read per token cold / warm, KiB | ask peak MiB |")
print("|---|---|---|---|---|---|---|---|---|", flush=True)
ok = True
try:
    for tokens in map(int, opt.tokens.split(",")):
        for depth in map(int, opt.depths.split(",")):
            key = f"{rng.randrange(100000):05d}"
            store = os.path.join(work, "store")
            source = text(tokens - 1, depth, key, opt.skip)  # and BOS
            made = cairn("ingest", store, "-m", MODEL, "-c", "book", source, "--fetch", "read", "--ram", opt.ram)
            cold = [ask(store, "book", "read", True) for _ in range(opt.asks)]
            warm = [ask(store, "book", "read", False) for _ in range(opt.asks)]
            right = sum(a["answer"] == key for a in cold + warm)
            peak = max(a["stats"]["peak_rss_bytes"] for a in cold + warm)
            row = {"tokens": tokens, "depth": depth, "key": key, "ingest": made, "cold": cold, "warm": warm}
            results["runs"].append(row)
            per = lambda a: a["stats"]["read_bytes"] / a["tokens"] / 1024
            first = lambda a: a["stats"]["first_token_seconds"]
            print(f"| {tokens:,} | {depth} % | {made['tokens_per_second']:,.0f} | {made['peak_rss_bytes'] / MIB:.1f} | "
                  f"{cold[0]['stats']['store_bytes'] / MIB:,.0f} | {right}/{len(cold + warm)} | "
                  f"{median(cold, first):.3f} / {median(warm, first):.3f} | {median(cold, per):,.0f} / {median(warm, per):,.0f} | "
                  f"{peak / MIB:.1f} |", flush=True)
            ok &= right == len(cold + warm) and peak <= budget and made["peak_rss_bytes"] <= budget
            shutil.rmtree(store)

    key = f"{rng.randrange(100000):05d}"
    store = os.path.join(work, "store")
    holder = rng.randrange(8)
    for i in range(8):
        cairn("ingest", store, "-m", MODEL, "-c", f"part{i}", text(65536, 50, key if i == holder else None, opt.skip + i * 70000),
              "--fetch", "read", "--ram", opt.ram)
    asks = [ask(store, "part*", "read", True) for _ in range(opt.asks)]
    right = sum(a["answer"] == key for a in asks)
    a = asks[0]
    results["attach"] = {"contexts": 8, "holder": f"part{holder}", "key": key, "asks": asks}
    first = median(asks, lambda x: x["stats"]["first_token_seconds"])
    print(f"\n8 contexts of 65,536 tokens ingested separately, the key in part{holder}: {right}/{len(asks)} right, "
          f"first token {first:.3f} s cold, peak {a['stats']['peak_rss_bytes'] / MIB:.1f} MiB, "
          f"{a['stats']['stored_blocks_used']} of {a['stats']['stored_blocks']} stored blocks used", flush=True)
    ok &= right == len(asks)
finally:
    shutil.rmtree(work, ignore_errors=True)
if opt.json:
    with open(opt.json, "w") as f:
        json.dump(results, f, indent=1)
print("\nall right and within the budget" if ok else "\nNOT all right or not within the budget")
sys.exit(0 if ok else 1)
