#!/usr/bin/env python3
"""llama.cpp and Cairn on the same GGUF file, text and machine: reading a text, asking it again after a restart.

llama.cpp evaluates the text with attention to all of it, saves its state to a file, and a new process loads that state
and generates. Cairn ingests the text into a store, and a new process asks it. Processes take turns; medians are printed,
and the extremes. Both use the same number of threads and f16 keys and values. llama.cpp comes as node-llama-cpp, which
npm installs below --dir with a binary of the CPU build; its memory includes that of node, which is shown too.

    bench/peers/llama.py [--tokens 32768] [--threads 2] [--generate 64] [--repeats 5] [--cairn build/cairn] [--dir DIR]
                         [--json FILE]

What the two compute differs, and that is the point: one step of llama.cpp attends to all tokens, one of Cairn to its
block, the window and k blocks of each head. Answers are not compared: the model was trained to attend the second way.
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile, time

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.dirname(os.path.dirname(here))
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--model", default=os.path.join(root, "models", "cairn-tiny-f16.gguf"))
ap.add_argument("--tokens", type=int, default=32768)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--generate", type=int, default=64)
ap.add_argument("--repeats", type=int, default=5)
ap.add_argument("--dir", help="where node-llama-cpp, texts and stores go (a temporary directory)")
ap.add_argument("--json")
opt = ap.parse_args()
work = opt.dir or tempfile.mkdtemp(prefix="cairn-llama.")
os.makedirs(work, exist_ok=True)
modules, MIB = os.path.join(work, "node_modules"), 1 << 20


def run(args, **more):
    done = subprocess.run(args, stdout=subprocess.PIPE, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(args[:3])}: exit {done.returncode}: {done.stdout.decode()}")
    return done.stdout


def llama(what):
    out = run(["node", os.path.join(here, "llama.mjs"), modules, opt.model, text, state, str(opt.tokens), str(opt.threads),
               str(opt.generate), what])
    return json.loads(out.splitlines()[-1])


def cairn(*args):
    return json.loads(run([opt.cairn, *args, "-m", opt.model, "--threads", str(opt.threads), "--json"]))


def ask():
    t = time.monotonic()
    out = cairn("ask", store, "-c", "book", "-n", str(opt.generate), "--stop", "\\0", "\nWhat is the pass key? The pass key is ")
    out["wall_seconds"] = time.monotonic() - t
    return out


def row(what, theirs, ours, unit, digits):
    a, b = statistics.median(theirs), statistics.median(ours)
    spread = lambda x: f"{min(x):,.{digits}f}-{max(x):,.{digits}f}" if len(x) > 1 else ""
    print(f"| {what}, {unit} | {a:,.{digits}f} | {spread(theirs)} | {b:,.{digits}f} | {spread(ours)} | {a / b:,.1f} |")
    results["rows"].append({"what": what, "unit": unit, "llama.cpp": theirs, "cairn": ours})


results = {"tokens": opt.tokens, "threads": opt.threads, "model": os.path.basename(opt.model), "rows": []}
try:
    if not os.path.isdir(os.path.join(modules, "node-llama-cpp")):
        run(["npm", "install", "--silent", "--prefix", work, "node-llama-cpp@3"])
    text, state, store = (os.path.join(work, x) for x in ("text", "state", "store"))
    with open(text, "wb") as f:
        f.write(run([os.path.join(root, "tools", "text.sh"), str(opt.tokens - 1), "2000000"]))
    shutil.rmtree(store, ignore_errors=True)
    read, made = llama("read"), cairn("ingest", store, "-c", "book", text)
    theirs, ours = [], []
    for _ in range(opt.repeats):
        theirs.append(llama("resume"))
        ours.append(ask())
    with open(os.path.join(os.path.dirname(modules), "node_modules", "node-llama-cpp", "package.json")) as f:
        results["node-llama-cpp"] = json.load(f)["version"]
    if read["tokens"] != opt.tokens or made["new_tokens"] != opt.tokens:
        sys.exit(f"the text is {read['tokens']} tokens to llama.cpp and {made['new_tokens']} to cairn, not {opt.tokens}")
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    print(f"{opt.tokens:,} tokens, {results['model']}, {opt.threads} threads of {os.cpu_count()} x {cpu}; node-llama-cpp "
          f"{results['node-llama-cpp']}; {opt.repeats} runs each in turn, {opt.generate} tokens generated\n")
    print("| | llama.cpp | | Cairn | | ratio |\n|---|---|---|---|---|---|")
    row("reading the text once", [read["read_seconds"]], [made["seconds"]], "s", 2)
    row("on disk", [read["state_bytes"] / MIB], [made["store_bytes"] / MIB], "MiB", 1)
    row("new process to first token", [x["first_token_seconds"] for x in theirs],
        [x["wall_seconds"] - x["stats"]["decode_seconds"] for x in ours], "s", 3)
    row("of it from the loaded model on", [x["first_token_seconds"] - x["loaded"] for x in theirs],
        [x["stats"]["first_token_seconds"] for x in ours], "s", 3)
    row("each further token", [x["token_milliseconds"] for x in theirs],
        [1000 * x["stats"]["decode_seconds"] / (x["tokens"] - 1) for x in ours], "ms", 2)
    row("peak memory of the new process", [x["peak_rss_bytes"] / MIB for x in theirs],
        [x["stats"]["peak_rss_bytes"] / MIB for x in ours], "MiB", 1)
    node = statistics.median(x["runtime_rss_bytes"] for x in theirs) / MIB
    results["node_rss_mib"] = node
    print(f"\nBefore it loads a model, node alone takes {node:.1f} MiB.")
finally:
    if opt.dir is None:
        shutil.rmtree(work, ignore_errors=True)
    else:
        for path in ("text", "state"):
            if os.path.exists(os.path.join(work, path)):
                os.remove(os.path.join(work, path))
        shutil.rmtree(os.path.join(work, "store"), ignore_errors=True)
if opt.json:
    with open(opt.json, "w") as f:
        json.dump(results, f, indent=1)
