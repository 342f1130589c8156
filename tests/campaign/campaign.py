"""What the campaigns share: a small store to be hurt, the commands that hurt it, and what must hold afterwards.

The model is the golden one of tests/data (blocks of 15 tokens, two stored layers), so a command takes about 30 ms and a
store about 3 MiB. All texts, moments and choices follow from --seed.
"""
import argparse, glob, json, os, random, re, shutil, struct, subprocess, sys, tempfile, time

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODEL = os.path.join(root, "tests", "data", "golden", "clamped_forward.gguf")
TIMEOUT = 60  # seconds; nothing here takes one when nobody is in the way


class Broken(Exception):
    """What was promised does not hold."""


def arguments(doc, **more):
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", default=os.path.join(root, "build"), help="build directory (build)")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--json", metavar="FILE", help="figures as one JSON object")
    ap.add_argument("--dir", help="scratch directory; kept (a temporary one, deleted)")
    ap.add_argument("--only", help="operations by name, separated by commas (all)")
    for name, (default, text) in more.items():
        ap.add_argument("--" + name, type=int, default=default, help=f"{text} ({default})")
    return ap.parse_args()


class Outcome:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __str__(self):
        return f"exit code {self.code}, stderr: {self.err.strip()[-600:]}"


class Bench:
    """A scratch directory, the command, and the fault library."""

    def __init__(self, opt):
        self.opt = opt
        self.kept = opt.dir is not None
        self.dir = os.path.realpath(opt.dir) if self.kept else tempfile.mkdtemp(prefix="cairn-campaign-")
        os.makedirs(self.dir, exist_ok=True)
        self.cairn, self.fault, self.judge = (self.take(*names) for names in (
            ("cairn",), ("tests", "libcampaign_fault.so"), ("tests", "campaign_judge")))
        self.commands = 0
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("CAIRN_FAULT_")}
        # One thread: what is at stake are the calls and their order. pread: io_uring's reads pass no call of libc.
        self.env.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", CAIRN_FETCH_READER="sync-buffered")

    def take(self, *names):
        """A copy of what was built, so that a build may go on meanwhile."""
        path = os.path.join(self.opt.build, *names)
        if not os.path.exists(path):
            sys.exit(f"{path} is missing: build with -DCAIRN_TESTS=ON, or name the directory with --build")
        os.makedirs(self.path("bin"), exist_ok=True)
        return shutil.copy(path, self.path("bin"))

    def done(self):
        if not self.kept:
            shutil.rmtree(self.dir, ignore_errors=True)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def faulty(self, below, at, do="kill", kinds="WSNT", times=1, log=None):
        """Environment of a process whose `at`-th call below a directory is hit."""
        env = dict(self.env, LD_PRELOAD=self.fault, CAIRN_FAULT_BELOW=below, CAIRN_FAULT_AT=str(at),
                   CAIRN_FAULT_DO=str(do), CAIRN_FAULT_KINDS=kinds, CAIRN_FAULT_TIMES=str(times))
        if log is not None:
            env["CAIRN_FAULT_LOG"] = log
        return env

    def start(self, args, env=None):
        self.commands += 1
        return subprocess.Popen([self.cairn, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=env or self.env, cwd=self.dir)

    def run(self, *args, env=None, timeout=TIMEOUT):
        p = self.start(args, env)
        try:
            out, err = p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            p.kill()
            p.communicate()
            raise Broken(f"'cairn {' '.join(args)}' hangs: no end after {timeout} s")
        return Outcome(p.returncode, out, err.decode(errors="replace"))

    def must(self, *args, env=None):
        o = self.run(*args, env=env)
        if o.code != 0:
            raise Broken(f"'cairn {' '.join(args)}': {o}")
        return o

    # ---- the store that is hurt ----

    def template(self):
        """Contexts a (with index files), draft (a fork of a that was extended), b; one more was dropped, so that pages
        are free; and the export of b as a file."""
        if os.path.exists(self.path("template")):
            shutil.rmtree(self.path("template"))
        texts = {}
        r = random.Random(self.opt.seed * 7919 + 1)
        words = ["".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(r.randint(1, 8))) for _ in range(200)]
        for name, n in (("a", 1500), ("b", 2500), ("c", 1200), ("d", 700), ("gone", 1000)):
            text = " ".join(r.choice(words) for _ in range(n))[:n]
            texts[name] = self.path(name + ".txt")
            with open(texts[name], "w") as f:
                f.write(text)
        store = self.path("template")
        for name in ("gone", "a", "b"):
            self.must("ingest", store, "-m", MODEL, "-c", name, texts[name])
        self.must("fork", store, "a", "draft", "--at", "700")
        self.must("ingest", store, "-m", MODEL, "-c", "draft", "--append", texts["d"])
        self.must("reindex", store, "-m", MODEL, "-c", "a", "--index", "flat")
        self.must("drop", store, "gone")
        self.must("export", store, "b", self.path("b.cairn"))
        return texts

    def copy(self, name, source="template"):
        to = self.path(name)
        shutil.rmtree(to, ignore_errors=True)
        os.makedirs(to)
        shutil.copytree(self.path(source), os.path.join(to, "store"))
        return to

    # ---- what a store holds ----

    def look(self, store, compact=False):
        """Every record checked, every context exported; None if there is no store. With `compact` it is compacted then,
        and checked again: what interrupted drops and imports left behind is gone, and stores can be compared."""
        out = self.path("exports")
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        self.commands += 1
        p = subprocess.run([self.judge, store, out, *(["compact"] if compact else [])], capture_output=True, text=True,
                           timeout=TIMEOUT, env=self.env)
        if p.returncode == 4:
            return None
        if p.returncode != 0:
            raise Broken(f"exit code {p.returncode}: {p.stderr.strip()[:1000]}")
        lines = p.stdout.splitlines()
        state = State(lines.pop() if compact else "")
        for line in lines:
            number, tokens, complete, name = line.split("\t")
            state.contexts[name] = Content(os.path.join(out, number))
        return state

    def answer(self, store, name):
        """What the model says next, its sources, and whether an index was refused."""
        o = self.must("ask", store, "-m", MODEL, "-c", name, "-n", "4", "--stop", "", "--sources=2", "word")
        return o.out, o.err


class State:
    def __init__(self, numbers):
        self.contexts, self.numbers = {}, numbers


class Content:
    """An export file (docs/format.md) without what may differ between two ingests of one text: times and hashes."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        if data[:8] != b"CAIRNEXP":
            raise Broken(f"{path} is not an export file")
        head = struct.unpack_from("<I", data, 12)[0]
        self.C = struct.unpack_from("<I", data, 40)[0]
        self.blocks = struct.unpack_from("<Q", data, 120)[0]
        tail = struct.unpack_from("<I", data, 128)[0]
        self.block_bytes = struct.unpack_from("<Q", data, 176)[0]
        if len(data) != head + self.blocks * self.block_bytes + 16:
            raise Broken(f"{path}: {len(data)} bytes, {self.blocks} blocks of {self.block_bytes}")
        self.input = data[152:172]  # bytes, hash, flags
        self.body = data[head:-16]
        self.tail = struct.unpack_from(f"<{tail}i", data, 192)

    def tokens(self):
        out = []
        for b in range(self.blocks):
            out += struct.unpack_from(f"<{self.C}i", self.body, b * self.block_bytes + 32)
        return out + list(self.tail)

    def __eq__(self, other):
        return (self.body, self.tail, self.input) == (other.body, other.tail, other.input)

    def begins(self, whole):
        """Are these the first blocks and tokens of `whole`, bit for bit?"""
        tokens = self.tokens()
        return whole.body[:len(self.body)] == self.body and whole.tokens()[:len(tokens)] == tokens


class Operation:
    """A command that changes a store."""

    def __init__(self, name, target, args, creates=False, grows=False):
        self.name, self.target, self.args = name, target, args
        self.creates = creates  # there is no store before
        self.grows = grows      # what is committed of the target only grows


def operations(texts):
    small = ["-m", MODEL, "--chunk-blocks", "4", "--commit-bytes", "64K", "--threads", "1"]
    return [
        Operation("create", "c", ["ingest", "STORE", *small, "-c", "c", texts["c"]], creates=True, grows=True),
        Operation("ingest", "c", ["ingest", "STORE", *small, "-c", "c", texts["c"]], grows=True),
        Operation("append", "draft", ["ingest", "STORE", *small, "-c", "draft", "--append", texts["c"]], grows=True),
        Operation("replace", "b", ["ingest", "STORE", *small, "-c", "b", "--replace", texts["c"]]),
        Operation("fork", "branch", ["fork", "STORE", "a", "branch", "--at", "1000"]),
        Operation("drop", "b", ["drop", "STORE", "b"]),
        Operation("rename", "b", ["rename", "STORE", "b", "renamed"]),
        Operation("reindex", None, ["reindex", "STORE", "-m", MODEL, "-c", "a", "--index", "hnsw"]),
        Operation("compact", None, ["compact", "STORE"]),
        Operation("import", "imported", ["import", "STORE", "FILE", "imported"]),
        Operation("export", None, ["export", "STORE", "a", "OUT"]),
    ]


class Witness:
    """An operation's store before it and after an undisturbed run of it."""

    def __init__(self, bench, op):
        self.bench, self.op, self.output = bench, op, None
        self.before = {} if op.creates else bench.look(bench.path("template")).contexts
        self.file = Content(bench.path("b.cairn"))
        where = self.fresh("witness-" + op.name)
        store = os.path.join(where, "store")
        start = time.monotonic()
        bench.must(*self.args(where))
        self.seconds = time.monotonic() - start
        self.asked = "a" if not op.creates else op.target
        self.answer = bench.answer(store, self.asked)
        self.together = bench.answer(store, "*")
        end = bench.look(store, compact=True)
        self.after, self.numbers, self.names = end.contexts, end.numbers, self.files(store)
        shutil.rmtree(where)

    def fresh(self, name):
        """A directory with the store to run on."""
        if not self.op.creates:
            return self.bench.copy(name)
        where = self.bench.path(name)
        shutil.rmtree(where, ignore_errors=True)
        os.makedirs(where)
        return where

    def args(self, where):
        names = {"STORE": os.path.join(where, "store"), "FILE": self.bench.path("b.cairn"),
                 "OUT": os.path.join(where, "out.cairn")}
        return [names.get(a, a) for a in self.op.args]

    @staticmethod
    def files(store):
        """Names of all files, without the number of the data directory and the generation of index files. Kept ends of
        contexts ("tail-<context>") may be missing: they are made again by who needs them."""
        out = []
        for where, _, names in os.walk(store):
            for n in names:
                if os.path.basename(where) == "lease":
                    continue  # a file nobody holds is nobody's, and a killed process cannot remove its own
                if re.fullmatch(r"tail-\d+", n):
                    continue
                if os.path.basename(where) == "index":
                    n = n.split("-")[0] + "-G" + n[n.find("-") + 1:].lstrip("0123456789")
                part = os.path.relpath(where, store)
                out.append(("data" if part.startswith("data-") else part) + "/" + n)
        return sorted(out)

    def check_half(self, where, floor=0):
        """What must hold of a store in which the operation was stopped at any moment. `floor`: tokens of the target that
        had been committed. Returns its contexts, None where there is no store yet."""
        op, store = self.op, os.path.join(where, "store")
        state = self.bench.look(store)
        if state is None:
            if not op.creates or floor > 0:
                raise Broken(f"no store; {floor} tokens were committed")
            return None
        now = state.contexts
        for name in sorted(set(self.before) | set(now)):
            here, was, will = now.get(name), self.before.get(name), self.after.get(name)
            good = same(here, was) or same(here, will)
            if name.startswith(".import-") and op.name == "import":
                good = here.begins(self.file)
            elif name == op.target and op.grows and here is not None:
                good = here.begins(will) and (was is None or was.begins(here))
            elif name == op.target and op.name == "replace" and here is not None:
                good = good or here.begins(will)
            if not good:
                raise Broken(f"context '{name}': " + ("is gone" if here is None else f"{here.blocks} blocks, "
                             f"{len(here.tail)} tokens after them: neither what was nor what comes"))
        if op.name == "rename" and ("b" in now) == ("renamed" in now):
            raise Broken("both names or none")
        held = len(now[op.target].tokens()) if op.target in now else 0
        if op.grows and held < floor:
            raise Broken(f"'{op.target}' has {held} tokens; {floor} were committed")
        out = os.path.join(where, "out.cairn")
        if os.path.exists(out) and not Content(out) == self.before["a"]:
            raise Broken("an export file is there and not whole")
        return now

    def runs_again(self, now):
        """A command that has done its work is not always one that does nothing: a second fork is an error."""
        op = self.op
        if now is None or op.target is None or op.name == "replace":
            return True
        return not same(now.get(op.target), self.after.get(op.target))

    def finish(self, where, now):
        """Runs the operation again where it has to be, and compares with the undisturbed run."""
        bench, store = self.bench, os.path.join(where, "store")
        if self.runs_again(now):
            bench.must(*self.args(where))
        answer = bench.answer(store, self.asked)
        if answer != self.answer:
            raise Broken(f"in the end another answer from '{self.asked}': {answer}, expected {self.answer}")
        together = bench.answer(store, "*")
        if together != self.together:
            raise Broken(f"in the end another answer from all contexts: {together}, expected {self.together}")
        end = bench.look(store, compact=True)
        if set(end.contexts) != set(self.after):
            raise Broken(f"in the end contexts {sorted(end.contexts)}, expected {sorted(self.after)}")
        for name, content in end.contexts.items():
            if not content == self.after[name]:
                raise Broken(f"in the end '{name}' differs from an undisturbed run")
        if end.numbers != self.numbers:
            raise Broken(f"in the end {end.numbers}, expected {self.numbers}")
        tails = glob.glob(os.path.join(store, "index", "tail-*"))
        if len(tails) > len(end.contexts):
            raise Broken(f"{len(tails)} kept ends of {len(end.contexts)} contexts")
        if self.files(store) != self.names:
            raise Broken(f"in the end other files: {self.files(store)}, expected {self.names}")


def same(a, b):
    return a is None and b is None or a is not None and b is not None and a == b


class Report:
    """Figures by kind of run; findings as they come. The exit code is 1 if there was any."""

    def __init__(self, bench, title):
        self.bench, self.title, self.start = bench, title, time.monotonic()
        self.counts, self.findings = {}, []
        Report.running = self

    def count(self, kind, n=1):
        self.counts[kind] = self.counts.get(kind, 0) + n

    def broken(self, what, why):
        self.findings.append({"where": what, "what": str(why)})
        print(f"{self.title}: BROKEN: {what}: {why}", flush=True)

    def end(self):
        seconds = time.monotonic() - self.start
        figures = {"campaign": self.title, "seed": self.bench.opt.seed, "counts": self.counts,
                   "commands": self.bench.commands, "findings": self.findings, "seconds": round(seconds, 1)}
        for kind, n in self.counts.items():
            print(f"{self.title}: {kind}: {n:,}")
        print(f"{self.title}: {self.bench.commands:,} commands in {seconds:.0f} s, seed {self.bench.opt.seed}: "
              f"{len(self.findings)} findings")
        if self.bench.opt.json:
            with open(self.bench.opt.json, "w") as f:
                json.dump(figures, f, indent=1)
        self.bench.done()
        sys.exit(1 if self.findings else 0)


def stop_early(*_):
    """SIGTERM: the figures so far."""
    Report.running.count("stopped early", 1)
    Report.running.end()


def wanted(opt, ops):
    names = opt.only.split(",") if opt.only else None
    return [op for op in ops if names is None or op.name in names]
