#!/usr/bin/env python3
"""Ten million tokens of real text as one context, with named keys at as many depths, asked one by one by new processes.

The text is tools/text.sh's (from byte 2,000,000 on: prose) with sentences "The pass key of NAME is 12345." spread evenly from
its begin to its end. Reading it takes an hour or more: with --minutes M the script stops after M minutes, and run again
with the same --dir and options it goes on where it was. When all is there it asks for every key, cold (the store's pages
dropped from the page cache) and warm, takes the time of a token from answers of --steps tokens, and prints what it found.
What is asked must stay within 1 GiB of VmHWM. The store is deleted at the end unless --keep.

    bench/ten_million.py --dir DIR [--tokens 10485760] [--keys 11] [--minutes M] [--ram 768M] [--cairn build/cairn]
                         [--seed 1] [--steps 200] [--json FILE] [--keep]
"""
import argparse, json, os, random, shutil, signal, statistics, subprocess, sys, time

sys.dont_write_bytecode = True
import driver

MIB = 1 << 20
root = driver.root
MODEL = os.path.join(root, "models", "cairn-tiny-f16.gguf")

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--dir", required=True, help="where text and store are kept between runs")
ap.add_argument("--tokens", type=int, default=10485760)
ap.add_argument("--keys", type=int, default=11)
ap.add_argument("--minutes", type=float, help="read for so long; without it to the end")
ap.add_argument("--ram", default="768M")
ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--steps", type=int, default=200)
ap.add_argument("--json")
ap.add_argument("--keep", action="store_true")
opt = ap.parse_args()
os.makedirs(opt.dir, exist_ok=True)
store, source, journal = (os.path.join(opt.dir, name) for name in ("store", "text", "journal.json"))
rng = random.Random(opt.seed)
names = ["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(4)) for _ in range(opt.keys)]
keys = [f"{rng.randrange(100000):05d}" for _ in names]


def make_text():
    said = [driver.says(k, n).encode() for n, k in zip(names, keys)]
    size = opt.tokens - 1 - sum(map(len, said))  # and BOS
    book = subprocess.run([os.path.join(root, "tools", "text.sh"), str(size), "2000000"], stdout=subprocess.PIPE, check=True).stdout
    if len(book) != size:
        sys.exit(f"tools/text.sh has {len(book)} bytes, not {size}")
    with open(source, "wb") as f:
        at = 0
        for i, sentence in enumerate(said):
            upto = size * i // max(1, len(said) - 1) if i + 1 < len(said) else size - size // 200
            f.write(book[at:upto] + sentence)
            at = upto
        f.write(book[at:])


def read_on():
    """Ingests, for --minutes if it was given. The exit code, and what was said."""
    p = subprocess.Popen([opt.cairn, "ingest", store, "-m", MODEL, "-c", "book", source, "--fetch", "read", "--ram", opt.ram,
                          "--json"], stdout=subprocess.PIPE)
    try:
        out = p.communicate(timeout=opt.minutes * 60 if opt.minutes else None)[0]
    except subprocess.TimeoutExpired:
        p.send_signal(signal.SIGINT) # it stores what is whole
        out = p.communicate()[0]
    return p.returncode, json.loads(out)


def ask(i, cold, *more):
    if cold:
        driver.drop_cache(store)
    return driver.cairn(opt.cairn, "ask", store, "-m", MODEL, "-c", "book", "--fetch", "read", "--ram", opt.ram, *more,
                        driver.asks(names[i]))


def plain(n):
    """Seconds and peak resident bytes of an answer of n tokens, from the start of the process to its end."""
    began = time.monotonic()
    p = subprocess.Popen([opt.cairn, "ask", store, "-m", MODEL, "-c", "book", "--fetch", "read", "--ram", opt.ram, "-n", str(n),
                          "--stop", "", "-q", "The "], stdout=subprocess.DEVNULL)
    usage = os.wait4(p.pid, 0)[2]
    return time.monotonic() - began, usage.ru_maxrss * 1024


runs = json.load(open(journal)) if os.path.exists(journal) else []
if not os.path.exists(source):
    make_text()
began = time.monotonic()
code, made = read_on()
runs.append({"seconds": time.monotonic() - began, "exit": code, "said": made})
json.dump(runs, open(journal, "w"), indent=1)
have = next(c for c in driver.cairn(opt.cairn, "list", store)["contexts"] if c["name"] == "book")["tokens"]
print(f"{have:,} of {opt.tokens:,} tokens after {sum(r['seconds'] for r in runs) / 60:.1f} minutes in {len(runs)} "
      f"runs; this one: {json.dumps(made)}", flush=True)
if code != 0:
    sys.exit("not all is read yet: run it again")

asks = [(i, cold, ask(i, cold, "-n", "8", "--stop", ".")) for cold in (True, False) for i in range(opt.keys)]
alone = min(plain(1)[0] for _ in range(3))
walls, peaks = zip(*(plain(opt.steps + 1) for _ in range(3)))
step = (statistics.median(walls) - alone) / opt.steps
first = lambda cold: statistics.median(a["stats"]["first_token_seconds"] for _, c, a in asks if c == cold)
right = {cold: sum(a["answer"] == keys[i] for i, c, a in asks if c == cold) for cold in (True, False)}
peak = max(*peaks, *(a["stats"]["peak_rss_bytes"] for _, _, a in asks))
size = sum(os.path.getsize(os.path.join(b, f)) for b, _, fs in os.walk(store) for f in fs)
print(f"right: {right[True]}/{opt.keys} cold, {right[False]}/{opt.keys} warm; first token {first(True):.3f} s cold, {first(False):.3f} s "
      f"warm; store {size / MIB:,.0f} MiB; peak of ask {peak / MIB:.1f} MiB; a token {step * 1e3:.2f} ms ({opt.steps} of them, median of 3 answers less one of a token)")
for i, cold, a in asks:
    if a["answer"] != keys[i]:
        print(f"  {'cold' if cold else 'warm'}, depth {100 * i / max(1, opt.keys - 1):.0f} %: {names[i]} is {keys[i]}, answered {a['answer']!r}")
if opt.json:
    json.dump({"runs": runs, "keys": list(zip(names, keys)), "asks": [{"key": i, "cold": c, "said": a} for i, c, a in asks],
               "step_seconds": step, "answers": walls, "store_bytes": size}, open(opt.json, "w"), indent=1)
if not opt.keep: # what we made, not what else may lie there
    shutil.rmtree(store)
    os.remove(source)
    os.remove(journal)
    if not os.listdir(opt.dir):
        os.rmdir(opt.dir)
sys.exit(0 if peak <= 1 << 30 else 1)
