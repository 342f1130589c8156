#!/usr/bin/env python3
"""llama.cpp on the same GGUF file and text: a generated token, the first token after a restart, memory. In turn, one run.

llama.cpp keeps all keys and values in RAM and attends to all of them; after a restart it loads the state it saved. Cairn
opens its store. llama.cpp comes as npm's node-llama-cpp, which carries a CPU build; it is installed into --npm (a
temporary directory otherwise) and runs under node, whose own start and memory are part of its figures: an empty node
process is measured beside it. Its better setting of flash attention counts.

    bench/peers/llama.py --corpus FILE [--cairn build/cairn] [--tokens 32768] [--threads 2] [--steps 200] [--repeats 5]
                         [--npm DIR] [--dir DIR] [--json FILE]

Needs node (20 or later) and npm.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.dirname(os.path.dirname(here))
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--corpus", required=True, help="one file of text")
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--model", default=os.path.join(root, "models", "cairn-tiny-f16.gguf"))
ap.add_argument("--tokens", type=int, default=32768)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--steps", type=int, default=200)
ap.add_argument("--repeats", type=int, default=5)
ap.add_argument("--npm")
ap.add_argument("--dir")
ap.add_argument("--json")
opt = ap.parse_args()
for name in ("cairn", "model", "corpus"):
    setattr(opt, name, os.path.abspath(getattr(opt, name)))


def run(args, cwd=None):
    r = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, cwd=cwd, env={**os.environ, "started": repr(time.time())})
    if r.returncode != 0:
        sys.exit(f"llama.py: {args[0]} {args[1]}: exit code {r.returncode}")
    return json.loads(r.stdout.decode().strip().splitlines()[-1] if args[0] == "node" else r.stdout)


def drop(path):
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


with tempfile.TemporaryDirectory(prefix="cairn-peer-", dir=opt.dir) as work:
    npm = opt.npm or work
    os.makedirs(npm, exist_ok=True)
    if not os.path.isdir(os.path.join(npm, "node_modules", "node-llama-cpp")):
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "node-llama-cpp"], cwd=npm, check=True, stdout=sys.stderr)
    state = os.path.join(work, "state")

    def llama(mode, flash):
        return run(["node", os.path.join(here, "llama.mjs"), mode, opt.model, opt.corpus, opt.tokens, opt.threads, flash,
                    opt.steps, state], cwd=npm)

    same = ["-m", opt.model, "--held-out", 1, "-c", opt.corpus, "--tokens", opt.tokens, "--threads", opt.threads, "--dir", work,
            "--json"]
    reads = {flash: llama("read", flash) for flash in (0, 1)}
    best = min(reads, key=lambda f: reads[f]["step_seconds"])
    theirs = {"cold": [], "warm": []}
    theirs_read = llama("read", best)
    for state_of in theirs:
        for _ in range(opt.repeats):
            if state_of == "cold":
                drop(state)
            theirs[state_of].append(llama("resume", best))
    ours = run([opt.cairn, "bench", "decode", *same, "--steps", opt.steps, "--cold", opt.repeats, "--no-dense"])["cells"][0]
    resume = {c["state"]: c for c in run([opt.cairn, "bench", "resume", *same, "--repeats", opt.repeats])["cells"]}
    ingest = run([opt.cairn, "bench", "ingest", *same, "--repeats", 1])["cells"][0]
    node = []
    for _ in range(opt.repeats):
        before = time.time()
        subprocess.run(["node", "-e", "0"], check=True)
        node.append(time.time() - before)

median = lambda rows, key: statistics.median(r[key] for r in rows)
ms = lambda x: f"{1e3 * x:.2f} ms"
mib = lambda x: f"{x / (1 << 20):.1f} MiB"
rows = [("one token, median", ms(ours["warm"]["seconds"]["median"]), ms(theirs_read["step_seconds"])),
        ("one token, p99", ms(ours["warm"]["seconds"]["p99"]), ms(theirs_read["step_p99_seconds"])),
        ("first token of a new process, cold", ms(resume["cold"]["first_token_seconds"]["median"]),
         ms(median(theirs["cold"], "first_token_seconds"))),
        ("the same, warm", ms(resume["warm"]["first_token_seconds"]["median"]), ms(median(theirs["warm"], "first_token_seconds"))),
        ("peak RSS of that process", mib(resume["warm"]["peak_rss_bytes"]), mib(median(theirs["warm"], "peak_rss_bytes"))),
        ("reading the text", f"{ingest['total_seconds']:.2f} s", f"{theirs_read['read_seconds']:.2f} s"),
        ("on disk", mib(resume["warm"]["store_bytes"]), mib(theirs_read["state_bytes"]))]
print(f"{opt.tokens:,} tokens, {opt.threads} threads; llama.cpp with flash attention {'on' if best else 'off'}; an empty node process "
      f"takes {ms(statistics.median(node))}\n")
print("| | Cairn | llama.cpp |\n|---|---|---|")
for row in rows:
    print("| " + " | ".join(row) + " |")
if opt.json:
    with open(opt.json, "w") as out:
        json.dump(dict(ours=ours, resume=resume, ingest=ingest, reads=reads, best_flash=best, read=theirs_read, theirs=theirs,
                       node_seconds=node), out, indent=2)
