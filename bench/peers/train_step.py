#!/usr/bin/env python3
"""A training step of the demo model in PyTorch, beside `cairn train`: the same model, loss, update, texts and shapes.

The model is written twice in plain eager operators, and both are measured: `blocks` walks over blocks of queries and
scores what each of them sees, as ours does; `full` scores all rows with all rows and masks, as most would write it. The
better of the two is what ours has to be compared with. Windows of one step run one after the other or in batches
(--batch): the best of them counts too. Memory of autograd is what limits the batch.

    bench/peers/train_step.py --check                     logits and losses against independent ones; exit 1 if they differ
    bench/peers/train_step.py [--ours build/cairn] [--threads 1,2] [--rows 512,1024] [--repeats 5] [--json FILE]

Every measurement is a process of its own: PyTorch with one setting, PyTorch with glibc told to keep its memory
(`malloc`: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_; eager operators allocate their outputs anew), the same with its
products in bf16 (autocast: oneDNN's, if the processor has units for them), and ours with either kind of products, one
after the other in every repeat, so that what else the machine does meets all of them. Tokens are those that have a
target, as in cairn's own reports. Beside tokens a second of wall time there are tokens a second of processor time, which
other processes disturb less. Needs python3-torch and python3-numpy.
"""
import argparse, json, math, os, platform, resource, statistics, struct, subprocess, sys, tempfile, time

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BOS, FIRST_BYTE, LANDMARK = 1, 3, 259
WINDOWS = 8  # of a step
DEMO_MODEL = os.path.join(root, "models", "cairn-tiny-f16.gguf")
DEMO = dict(vocab=260, width=192, layers=4, heads=3, head_dim=64, hidden=512, block=64, clamp=3, local={0: 1},
            theta=1e6, eps=1e-5)


# ---- GGUF: just what the golden model and the demo model hold ----

def read_gguf(path):
    """Metadata and tensors (float32, as torch has them: rows first) of a GGUF file, version 3."""
    import numpy as np
    with open(path, "rb") as f:
        data = f.read()
    at = 0

    def take(fmt):
        nonlocal at
        value, = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return value

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n:at].decode(errors="replace")

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, n = take("I"), take("Q")
            return [value(kind) for _ in range(n)]
        return take({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}[kind])

    if data[:4] != b"GGUF":
        sys.exit(f"{path}: no GGUF file")
    at = 8
    n_tensors, n_keys = take("Q"), take("Q")
    meta, where, tensors = {}, [], {}
    for _ in range(n_keys):
        key = text()
        meta[key] = value(take("I"))
    for _ in range(n_tensors):
        name = text()
        dims = [take("Q") for _ in range(take("I"))]
        where.append((name, dims, take("I"), take("Q")))
    align = meta.get("general.alignment", 32)
    begin = (at + align - 1) // align * align
    for name, dims, kind, offset in where:
        if kind not in (0, 1):
            sys.exit(f"{path}: tensor '{name}' has type {kind}, only f32 and f16 are read here")
        flat = np.frombuffer(data, "<f4" if kind == 0 else "<f2", math.prod(dims), begin + offset)
        tensors[name] = flat.astype(np.float32).reshape(dims[::-1])
    return meta, tensors


def shape_of(meta):
    layers, block = meta["qwen3.block_count"], meta["cairn.landmark.block_tokens"] + 1
    window = meta["cairn.landmark.local_window_blocks"]
    return dict(vocab=len(meta["tokenizer.ggml.tokens"]), width=meta["qwen3.embedding_length"], layers=layers,
                heads=meta["qwen3.attention.head_count"], head_dim=meta["qwen3.attention.key_length"],
                hidden=meta["qwen3.feed_forward_length"], block=block, clamp=meta["cairn.landmark.clamp_blocks"],
                local={layer: window for layer in meta["cairn.landmark.local_layers"]},
                theta=meta["qwen3.rope.freq_base"], eps=meta["qwen3.attention.layer_norm_rms_epsilon"])


# ---- the model: N windows of T rows, T a multiple of the block B ----

def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attend_blocks(q, k, v, bias, shape, window, tables):
    """q, k, v (N, H, T, D); one block of queries after the other. Landmarks end blocks; keys are rotated by their offset
    in the block, queries by age * B + offset, where every age from `clamp` on is the same."""
    N, H, T, D = q.shape
    B, A, n = shape["block"], shape["clamp"], T // shape["block"]
    cos, sin = tables
    q = q.reshape(N * H, n, B, D) / math.sqrt(D)
    k = rotate(k.reshape(N * H, n, B, D), cos[:B], sin[:B])
    v = v.reshape(N * H, n, B, D)
    turned = [rotate(q, cos[a * B:(a + 1) * B], sin[a * B:(a + 1) * B]) for a in range(min(A + 1, n))]
    bias = bias.repeat(N)[:, None, None]
    hidden = torch.ones(B, B - 1, dtype=torch.bool).triu(1)  # row j sees own tokens up to j; the landmark sees all
    out = []
    for i in range(n):
        lo = 0 if window is None else max(0, i - window)
        own = (turned[0][:, i] @ k[:, i, :B - 1].transpose(1, 2)).masked_fill(hidden, -math.inf)
        if lo == i:
            out.append(own.softmax(-1) @ v[:, i, :B - 1])
            continue
        parts, far = [], max(lo, i - A + 1)  # blocks [lo, far) are clamped
        if far > lo:
            parts.append(turned[A][:, i] @ k[:, lo:far].reshape(N * H, -1, D).transpose(1, 2))
        for b in range(far, i):
            parts.append(turned[i - b][:, i] @ k[:, b].transpose(1, 2))
        past = torch.cat(parts, -1).view(N * H, B, i - lo, B)
        group = torch.cat((own, past[..., B - 1] + bias), -1).softmax(-1)
        inside = past[..., :B - 1].softmax(-1) * group[..., B - 1:, None]
        out.append(group[..., :B - 1] @ v[:, i, :B - 1] +
                   inside.reshape(N * H, B, -1) @ v[:, lo:i, :B - 1].reshape(N * H, -1, D))
    return torch.stack(out, 1).view(N, H, T, D)


def attend_full(q, k, v, bias, shape, window, tables):
    """The same with products of all rows and masks."""
    N, H, T, D = q.shape
    B, A, n = shape["block"], shape["clamp"], T // shape["block"]
    cos, sin = tables
    at, block = torch.arange(T) % B, torch.arange(T) // B
    age = block[:, None] - block[None, :]
    k = rotate(k, cos[at], sin[at]).transpose(2, 3)
    scores = None
    for a in range(min(A + 1, n)):
        one = rotate(q, cos[a * B + at], sin[a * B + at]) @ k
        scores = one if scores is None else torch.where(age.clamp(max=A) == a, one, scores)
    scores = scores / math.sqrt(D)
    landmark = at == B - 1
    seen = age > 0 if window is None else (age > 0) & (age <= window)
    own = (age == 0) & (at[:, None] >= at[None, :]) & ~landmark
    gates = seen & landmark
    group = (scores + bias[:, None, None] * gates).masked_fill(~(own | gates), -math.inf).softmax(-1)
    inside = scores.masked_fill(landmark, -math.inf).view(N, H, T, n, B).softmax(-1)
    past = (inside * (group * gates).view(N, H, T, n, B)[..., B - 1:]).view(N, H, T, T)
    return (past + group * own) @ v


class Model:
    def __init__(self, shape, attention):
        self.shape, self.attend = shape, {"blocks": attend_blocks, "full": attend_full}[attention]
        D, s = shape["head_dim"], shape
        angle = torch.arange((s["clamp"] + 1) * s["block"], dtype=torch.float64)[:, None] * \
            s["theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        self.tables = angle.cos().float(), angle.sin().float()
        self.params = {}
        w, f, h = s["width"], s["heads"] * D, s["hidden"]
        torch.manual_seed(1)

        def matrix(name, rows, cols, std):
            self.params[name] = torch.randn(rows, cols).mul_(std).requires_grad_()

        def vector(name, n, value=1.0):
            self.params[name] = torch.full((n,), value).requires_grad_()

        matrix("token_embd.weight", s["vocab"], w, 0.02)
        matrix("output.weight", s["vocab"], w, w ** -0.5)
        vector("output_norm.weight", w)
        for layer in range(s["layers"]):
            b, less = f"blk.{layer}.", (2 * s["layers"]) ** -0.5
            for name, rows, cols, std in (("attn_q", f, w, w ** -0.5), ("attn_k", f, w, w ** -0.5),
                                          ("attn_v", f, w, w ** -0.5), ("attn_output", w, f, f ** -0.5 * less),
                                          ("ffn_gate", h, w, w ** -0.5), ("ffn_up", h, w, w ** -0.5),
                                          ("ffn_down", w, h, h ** -0.5 * less)):
                matrix(f"{b}{name}.weight", rows, cols, std)
            for name, n in (("attn_norm", w), ("ffn_norm", w), ("attn_q_norm", D), ("attn_k_norm", D)):
                vector(f"{b}{name}.weight", n)
            vector(f"{b}landmark_bias", s["heads"], math.log(s["block"] - 1))

    def load(self, meta, tensors):
        with torch.no_grad():
            for name, p in self.params.items():
                if name.endswith("landmark_bias"):
                    layer, heads = int(name.split(".")[1]), self.shape["heads"]
                    p.copy_(torch.tensor(meta["cairn.landmark.bias"][layer * heads:(layer + 1) * heads]))
                else:
                    p.copy_(torch.from_numpy(tensors[name]))

    def logits(self, tokens):
        s, p = self.shape, self.params
        N, T = tokens.shape
        heads, D, eps = s["heads"], s["head_dim"], s["eps"]
        x = p["token_embd.weight"][tokens]
        for layer in range(s["layers"]):
            b = f"blk.{layer}."
            x_ = norm(x, p[b + "attn_norm.weight"], eps)
            # One product for q, k and v, and one for gate and up, are the faster way.
            qkv = x_ @ torch.cat([p[f"{b}attn_{i}.weight"] for i in "qkv"]).t()
            q, k, v = qkv.view(N, T, 3, heads, D).permute(2, 0, 3, 1, 4)
            q, k = norm(q, p[b + "attn_q_norm.weight"], eps), norm(k, p[b + "attn_k_norm.weight"], eps)
            o = self.attend(q, k, v, p[b + "landmark_bias"], s, s["local"].get(layer), self.tables)
            x = x + o.transpose(1, 2).reshape(N, T, heads * D) @ p[b + "attn_output.weight"].t()
            x_ = norm(x, p[b + "ffn_norm.weight"], eps)
            g, u = (x_ @ torch.cat((p[b + "ffn_gate.weight"], p[b + "ffn_up.weight"])).t()).chunk(2, -1)
            x = x + (torch.nn.functional.silu(g) * u) @ p[b + "ffn_down.weight"].t()
        return norm(x, p["output_norm.weight"], eps) @ p["output.weight"].t()

    def loss(self, tokens, targets):
        """Sum of -ln p over rows that have a target."""
        logits = self.logits(tokens)
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1),
                                                 ignore_index=-1, reduction="sum")


class Optimizer:
    """Muon for the matrices of layers, AdamW for the rest: src/train/optimizer.c."""

    def __init__(self, params, adam=2e-3, muon=0.02, momentum=0.95, decay=0.05, clip=1.0):
        self.all = list(params.values())
        self.muon, self.momentum, self.decay, self.clip = muon, momentum, decay, clip
        self.matrices = [p for name, p in params.items() if name.startswith("blk.") and p.dim() == 2]
        self.first = [torch.zeros_like(p) for p in self.matrices]
        rest = [(name, p) for name, p in params.items() if not (name.startswith("blk.") and p.dim() == 2)]
        self.adam = torch.optim.AdamW([{"params": [p for _, p in rest if p.dim() == 2], "weight_decay": decay},
                                       {"params": [p for _, p in rest if p.dim() == 1], "weight_decay": 0.0}],
                                      lr=adam, betas=(0.9, 0.95), eps=1e-8)

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.all, self.clip)
        with torch.no_grad():
            for p, m in zip(self.matrices, self.first):
                self.orthogonal_step(p, m)
        self.adam.step()
        for p in self.all:
            p.grad = None

    def orthogonal_step(self, p, m):
        m.mul_(self.momentum).add_(p.grad)
        x = p.grad.add(m, alpha=self.momentum)
        rows, cols = x.shape
        x = x if rows <= cols else x.t()
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.t()
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
        x = x if rows <= cols else x.t()
        p.mul_(1 - self.muon * self.decay).sub_(x, alpha=self.muon * math.sqrt(max(1, rows / cols)))


# ---- windows of text ----

def text_of(paths):
    """Files and everything below directories, one after the other in the order of their paths, as cairn reads them."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            files += sorted(os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs)
        else:
            files.append(path)
    return b"".join(open(f, "rb").read() for f in files)


def windows_of(text, rows, n, seed):
    """n windows (tokens, targets): BOS, bytes, a landmark after each 63 of them; a token's target is the next one, across
    a landmark too. A landmark has none, nor has the last token."""
    B = DEMO["block"]
    content = rows - rows // B
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((n, rows), LANDMARK)
    targets = torch.full((n, rows), -1)
    at = torch.tensor([r for r in range(rows) if r % B != B - 1])
    for w in range(n):
        begin = int(torch.randint(len(text) - content, (1,), generator=generator))
        row = torch.tensor([BOS] + [FIRST_BYTE + b for b in text[begin:begin + content - 1]])
        tokens[w, at] = row
        targets[w, at[:-1]] = row[1:]
    return tokens, targets


# ---- against independent numbers ----

def bits_by_cairn(binary, tokens):
    """Bits a byte of one window by `cairn bench ppl`: every block retrieved is what training sees."""
    content = [t for t in tokens.tolist() if t != LANDMARK]
    with tempfile.NamedTemporaryFile() as f:
        f.write(bytes(t - FIRST_BYTE for t in content[1:]))
        f.flush()
        run = subprocess.run([binary, "bench", "ppl", "-m", DEMO_MODEL, "--corpus", f.name, "--held-out", "1", "--length",
                              str(len(content)), "--top-k", "all", "--dtype", "f32", "--json"], stdout=subprocess.PIPE)
    if run.returncode != 0:
        sys.exit(f"{binary} bench ppl: exit {run.returncode}: {run.stdout.decode()}")
    return json.loads(run.stdout)


def check(ours):
    """Logits of the golden model against those in its file, which an independent program wrote; bits a byte of a text
    against `cairn bench ppl`, if there is a cairn to ask; gradients of one attention against the other's."""
    failed = False

    def verdict(what, worst, bound):
        nonlocal failed
        failed |= not worst <= bound
        print(f"{'ok  ' if worst <= bound else 'FAIL'} {what}: off by {worst:.2g}, bound {bound:g}")

    golden = os.path.join(root, "tests", "data", "golden")
    with open(os.path.join(golden, "clamped_forward.json")) as f:
        want = json.load(f)
    run = want["runs"][0]
    assert run["k"] == "all"
    golden_meta, golden_tensors = read_gguf(os.path.join(golden, "clamped_forward.gguf"))
    shape = shape_of(golden_meta)
    # An open block is filled up: nothing before it sees what follows.
    padded = want["tokens"] + [BOS] * (-len(want["tokens"]) % shape["block"])
    meta, tensors = read_gguf(DEMO_MODEL)
    demo = shape_of(meta)
    if demo != {**DEMO, "theta": demo["theta"], "eps": demo["eps"]}:
        sys.exit(f"{DEMO_MODEL} is of another shape: {demo}")
    tokens, targets = windows_of(text_of([os.path.join(root, "docs")]), 512, 4, 1)
    grads = {}
    for name in ("blocks", "full"):
        model = Model(shape, name)
        model.load(golden_meta, golden_tensors)
        with torch.no_grad():
            got = model.logits(torch.tensor([padded]))[0][want["positions"]]
        verdict(f"{name}: logits of clamped_forward.gguf", float((got - torch.tensor(run["logits"])).abs().max()), 1e-4)
        model = Model(demo, name)
        model.load(meta, tensors)
        loss = model.loss(tokens, targets) / int((targets >= 0).sum())
        loss.backward()
        grads[name] = {key: p.grad for key, p in model.params.items()}
        if ours:
            with torch.no_grad():
                one = model.loss(tokens[:1], targets[:1]).item() / int((targets[:1] >= 0).sum()) / math.log(2)
            theirs = bits_by_cairn(ours, tokens[0])["cells"][0]["bits_per_byte"]
            verdict(f"{name}: {one:.4f} bits a byte of a text, cairn bench ppl", abs(one - theirs), 1e-4)
    verdict("gradients, one attention against the other: the farthest parameter",
            max(float((grads["blocks"][key] - g).norm() / g.norm()) for key, g in grads["full"].items()), 1e-4)
    return 1 if failed else 0


# ---- measuring ----

def time_torch(opt):
    """In a process of its own: steps after two that warm up; prints one line of JSON."""
    torch.set_num_threads(opt.worker_threads)
    rows, batch = opt.worker_rows, opt.worker_batch
    tokens, targets = windows_of(text_of(opt.corpus), rows, WINDOWS * (opt.steps + 2), 1)
    model = Model(DEMO, opt.worker_attention)
    optimizer = Optimizer(model.params)
    wall, updates, cpu, loss = [], [], 0.0, 0.0
    count = int((targets[:WINDOWS] >= 0).sum())
    for step in range(opt.steps + 2):
        begun, begun_cpu, loss = time.perf_counter(), time.process_time(), 0.0
        for first in range(step * WINDOWS, (step + 1) * WINDOWS, batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=opt.worker_bf16):
                one = model.loss(tokens[first:first + batch], targets[first:first + batch]) / count
            one.backward()
            loss += float(one.detach())
        before_update = time.perf_counter()
        optimizer.step()
        if step >= 2:
            wall.append(time.perf_counter() - begun)
            updates.append(time.perf_counter() - before_update)
            cpu += time.process_time() - begun_cpu
    print(json.dumps({"tokens_per_second": count / statistics.median(wall), "update_ms": statistics.median(updates) * 1e3,
                      "tokens_per_cpu_second": count * opt.steps / cpu, "bits_per_byte": loss / math.log(2),
                      "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def best_core():
    """What PyTorch's OpenBLAS is told the processor is: where it does not know it, it would take it for an old one."""
    with open("/proc/cpuinfo") as f:
        flags = next((line.split() for line in f if line.startswith("flags")), [])
    return "SkylakeX" if "avx512vl" in flags else "Haswell" if "avx2" in flags else "Nehalem"


def run_torch(opt, rows, threads, attention, batch, malloc, bf16=False):
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    env.setdefault("OPENBLAS_CORETYPE", best_core())
    if malloc:
        env.update(MALLOC_MMAP_THRESHOLD_="20000000000", MALLOC_TRIM_THRESHOLD_="20000000000")
    run = subprocess.run([sys.executable, os.path.abspath(__file__), "--worker-rows", str(rows), "--worker-threads",
                          str(threads), "--worker-attention", attention, "--worker-batch", str(batch), "--steps",
                          str(opt.steps), *(["--worker-bf16"] if bf16 else []), "--corpus", *opt.corpus], env=env,
                         stdout=subprocess.PIPE)
    if run.returncode != 0:
        sys.exit(f"PyTorch with {rows} rows, {attention}, batch {batch}: exit {run.returncode}")
    return json.loads(run.stdout)


def run_ours(opt, rows, threads, products):
    """Two updates warm up here too: the first report."""
    d = DEMO
    plan = {"name": "step", "model": {
        "width": d["width"], "layers": d["layers"], "heads": d["heads"], "kv_heads": d["heads"], "head_dim": d["head_dim"],
        "hidden": d["hidden"], "block_tokens": d["block"] - 1, "clamp_blocks": d["clamp"], "window_blocks": 1, "top_k": 4,
        "rope_theta": d["theta"], "local_layers": 1, "local_window_blocks": 1, "seed": 1, "threads": threads},
        "stages": [{"name": "text", "steps": opt.steps + 2, "window": rows, "windows": WINDOWS, "warmup": 0, "floor": 1,
                    "adam": 2e-3, "muon": 0.02, "text": 1, "text_weight": 1, "guide": 0}]}
    with tempfile.TemporaryDirectory() as work:
        log = os.path.join(work, "log.jsonl")
        with open(os.path.join(work, "plan.json"), "w") as f:
            json.dump(plan, f)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([opt.ours, "train", "-p", os.path.join(work, "plan.json"), "-o", os.path.join(work, "m.gguf"),
                              "--held-out", "0", "--products", products, "--log", log, "--report", "2", "--minutes", "1000", "--json",
                              *(word for path in opt.corpus for word in ("--corpus", path))], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if run.returncode != 0:
            sys.exit(f"{opt.ours} train: exit {run.returncode}: {run.stdout.decode()}{run.stderr.decode()}")
        with open(log) as f:
            reports = [json.loads(line) for line in f]
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime  # start and files included
    return {"tokens_per_second": statistics.median(r["tokens_per_second"] for r in reports[1:]),
            "tokens_per_cpu_second": sum(r["tokens"] for r in reports) / cpu,
            "bits_per_byte": reports[-1]["text_bits_per_byte"]}


def summary(samples, key):
    values = sorted(s[key] for s in samples)
    return {"median": statistics.median(values), "least": values[0], "most": values[-1], "samples": values}


def measure(opt):
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True).stdout
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    print(f"{cpu}, {os.cpu_count()} cores, PyTorch {torch.__version__}, commit {commit.strip()}; {WINDOWS} windows a step, "
          f"{opt.repeats} repeats of {opt.steps} steps, median (least..most)\n")
    print("| rows | threads | program | tokens/s | tokens/s of CPU | update, ms | ours is faster, per pair |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    results = []
    for rows in opt.rows:
        for threads in opt.threads:
            # The best way to run PyTorch is looked for once, then measured.
            tried = [(run_torch(opt, rows, threads, attention, batch, True)["tokens_per_second"], attention, batch)
                     for attention in opt.attention for batch in opt.batch]
            rate, attention, batch = max(tried)
            for r, a, b in sorted(tried, reverse=True):
                print(f"rows {rows}, threads {threads}: PyTorch {a}, batch {b}: {r:.0f} tokens/s", file=sys.stderr)
            ways = {f"PyTorch, {attention}, batch {batch}": lambda: run_torch(opt, rows, threads, attention, batch, False),
                    f"PyTorch, {attention}, batch {batch}, malloc": lambda: run_torch(opt, rows, threads, attention, batch, True)}
            ways[f"PyTorch, {attention}, batch {batch}, malloc, bf16"] = \
                lambda: run_torch(opt, rows, threads, attention, batch, True, True)
            if opt.ours:
                ways["cairn train, f32"] = lambda: run_ours(opt, rows, threads, "f32")
                ways["cairn train"] = lambda: run_ours(opt, rows, threads, "auto")
            samples = {name: [] for name in ways}
            for _ in range(opt.repeats):
                for name, run in ways.items():
                    samples[name].append(run())
            for name, got in samples.items():
                wall, of_cpu = summary(got, "tokens_per_second"), summary(got, "tokens_per_cpu_second")
                pairs = sorted(o["tokens_per_second"] / s["tokens_per_second"] for o, s in zip(samples["cairn train"], got)) \
                    if opt.ours and name != "cairn train" else None
                update = statistics.median(s["update_ms"] for s in got) if "update_ms" in got[0] else None
                spread = lambda s: f"{s['median']:.0f} ({s['least']:.0f}..{s['most']:.0f})"
                print(f"| {rows} | {threads} | {name} | {spread(wall)} | {spread(of_cpu)} | {f'{update:.0f}' if update else ''} | "
                      + (f"{statistics.median(pairs):.2f} ({pairs[0]:.2f}..{pairs[-1]:.2f})" if pairs else "") + " |", flush=True)
                results.append({"name": name, "rows": rows, "threads": threads, "windows": WINDOWS, "steps": opt.steps,
                                "cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit.strip(),
                                "tokens_per_second": wall, "tokens_per_cpu_second": of_cpu, "update_ms": update,
                                "bits_per_byte": got[-1]["bits_per_byte"], "ours_over_this": pairs})
    if opt.json:
        with open(opt.json, "w") as f:
            for result in results:
                f.write(json.dumps(result) + "\n")


def numbers(text):
    return [int(x) for x in text.split(",")]


ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--check", action="store_true")
ap.add_argument("--ours", metavar="CAIRN", help="the cairn command to measure beside PyTorch, or to check against")
ap.add_argument("--rows", type=numbers, default=[512, 1024], help="slots of a window (512,1024)")
ap.add_argument("--threads", type=numbers, default=[1, 2], help="(1,2)")
ap.add_argument("--attention", type=lambda s: s.split(","), default=["blocks", "full"], help="ways to try (blocks,full)")
ap.add_argument("--batch", type=numbers, default=[1, 8], help="windows of one forward to try (1,8)")
ap.add_argument("--steps", type=int, default=4, help="timed in each run (4)")
ap.add_argument("--repeats", type=int, default=5)
ap.add_argument("--corpus", nargs="+", default=[os.path.join(root, d) for d in ("docs", "include", "src")])
ap.add_argument("--json", metavar="FILE", help="a line of JSON for every row of the table")
for name, kind in (("rows", int), ("threads", int), ("batch", int), ("attention", str)):
    ap.add_argument(f"--worker-{name}", type=kind, help=argparse.SUPPRESS)
ap.add_argument("--worker-bf16", action="store_true", help=argparse.SUPPRESS)
opt = ap.parse_args()
try:
    import torch  # after --help
except ImportError:
    sys.exit("no PyTorch for this Python: apt-get install python3-torch, then /usr/bin/python3 bench/peers/train_step.py")

if opt.check:
    sys.exit(check(opt.ours))
time_torch(opt) if opt.worker_rows else measure(opt)
