#!/usr/bin/env python3
"""A step's attention by Cairn, by plain FAISS and files, and dense in RAM, in turn, at the same shape and lengths.

`cairn bench decode` ingests text and measures the attention of single tokens: search of landmarks, fetch of tiles,
attention over them, for all layers of the model that retrieve, one query head to a KV head. faiss_files.cpp does the
same work with what one would take otherwise: a FAISS index for each layer and head, a file and pread, plain loops that
the compiler vectorises for this machine. Its keys are random; its time does not depend on them, but for IVF's lists.

    bench/peers/retrieval.py --corpus PATH [--cairn build/cairn] [--tokens 16K,64K,256K] [--threads 1,2] [--index Flat]
                             [--steps 200] [--cold 9] [--dir DIR] [--json FILE]

Needs g++, libfaiss-dev and libopenblas-dev, as the build does.
"""
import argparse, json, os, subprocess, sys, tempfile

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.dirname(os.path.dirname(here))

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--corpus", action="append", required=True)
ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
ap.add_argument("--model", default=os.path.join(root, "models", "cairn-tiny-f16.gguf"))
ap.add_argument("--tokens", default="16K,64K,256K")
ap.add_argument("--threads", default="1,2")
ap.add_argument("--index", default="Flat", help="FAISS factory strings, separated by blanks")
ap.add_argument("--steps", type=int, default=200)
ap.add_argument("--cold", type=int, default=9)
ap.add_argument("--dir", help="where stores and files go (a temporary directory)")
ap.add_argument("--json")
opt = ap.parse_args()


def run(*args):
    r = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE)
    if r.returncode != 0:
        sys.exit(f"retrieval.py: {args[0]} {args[1]}: exit code {r.returncode}")
    return json.loads(r.stdout)


def count(text):
    return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text)


rows = []
with tempfile.TemporaryDirectory(prefix="cairn-peer-", dir=opt.dir) as work:
    peer = os.path.join(work, "faiss_files")
    subprocess.run(["g++", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-o", peer, os.path.join(here, "faiss_files.cpp"),
                    "-lfaiss", "-lopenblas", "-lgomp"], check=True)
    corpus = [x for path in opt.corpus for x in ("-c", path)]
    for threads in opt.threads.split(","):
        ours = run(opt.cairn, "bench", "decode", "-m", opt.model, "--held-out", 1, *corpus, "--tokens", opt.tokens, "--threads",
                   threads, "--steps", opt.steps, "--cold", opt.cold, "--dir", work, "--json")
        shape = ours["model"]["attention"]
        if shape["heads"] != shape["kv_heads"] or shape["block_tokens"] != 63:
            sys.exit("retrieval.py: the peer knows one query head to a KV head and blocks of 63 tokens")
        for cell in ours["cells"]:
            for index in opt.index.split():
                theirs = run(peer, os.path.join(work, "tiles"), cell["tokens"],
                             shape["layers"] - shape["local_layers"], shape["heads"], shape["head_dim"], shape["top_k"], index, opt.steps,
                             opt.cold, threads)
                rows.append(dict(tokens=cell["tokens"], threads=int(threads), index=index,
                                 cairn_warm=cell["warm"]["attention_seconds"]["median"],
                                 cairn_cold=cell["cold"]["attention_seconds"]["median"],
                                 cairn_dense=cell["dense_attention"]["seconds"]["median"], files=theirs))

print("Milliseconds of one token's attention in all retrieving layers, medians.\n")
print("| tokens | threads | Cairn warm | FAISS + file warm | ratio | Cairn cold | FAISS + file cold | ratio | dense: our kernels | "
      "dense: plain loops | over Cairn warm |")
print("|---|---|---|---|---|---|---|---|---|---|---|")
for r in rows:
    f = r["files"]
    print(f"| {r['tokens']:,} | {r['threads']} | {1e3 * r['cairn_warm']:.3f} | {1e3 * f['warm_seconds']:.3f} ({r['index']}) | "
          f"{f['warm_seconds'] / r['cairn_warm']:.1f} | {1e3 * r['cairn_cold']:.2f} | {1e3 * f['cold_seconds']:.2f} | "
          f"{f['cold_seconds'] / r['cairn_cold']:.1f} | {1e3 * r['cairn_dense']:.1f} | {1e3 * f['dense_seconds']:.1f} | "
          f"{min(r['cairn_dense'], f['dense_seconds']) / r['cairn_warm']:.0f} |")
if opt.json:
    with open(opt.json, "w") as out:
        json.dump(rows, out, indent=2)
