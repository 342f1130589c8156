"""What the drivers here share: the cairn command asked for JSON, and figures that are kept in a file each, so that a run
that was stopped goes on where it was."""
import argparse, json, os, subprocess, sys

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cairn(command, *args, progress=False):
    """The JSON answer of `command args`; its failure is ours."""
    run = subprocess.run([command, *map(str, args), "--json", *(["--progress"] if progress else [])],
                         stdout=subprocess.PIPE)
    if run.returncode != 0:
        sys.exit(f"cairn {args[0]}: exit {run.returncode}: {run.stdout.decode()}")
    return json.loads(run.stdout)


def says(key, name=None):
    """The sentence that hides a key, plain or by name, as src/train/recall.c writes it."""
    return f"\nThe pass key of {name} is {key}.\n" if name else f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"


def asks(name=None):
    whose = f" of {name}" if name else ""
    return f"\nWhat is the pass key{whose}? The pass key{whose} is "


def recall_arguments(doc, tokens, seed):
    """A parser with what drivers that hide keys in a text have in common."""
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--cairn", default=os.path.join(root, "build", "cairn"))
    ap.add_argument("--model", default=os.path.join(root, "models", "cairn-tiny-f16.gguf"))
    ap.add_argument("--text", required=True)
    ap.add_argument("--tokens", type=int, default=tokens)
    ap.add_argument("--seed", type=int, default=seed)
    ap.add_argument("--dir", help="where the store is made (a temporary directory)")
    return ap


def draw(rng, letters, n):
    return "".join(rng.choice(letters) for _ in range(n))


def text(path, n, rng):
    """n bytes of the file, or of 64 KiB pieces of the directory's files, each as likely as it is large."""
    if os.path.isfile(path):
        with open(path, "rb") as f:
            return f.read(n)
    piece = 1 << 16
    files = sorted(os.path.join(base, name) for base, _, names in os.walk(path) for name in names)
    sizes = [os.path.getsize(f) for f in files]
    out = b""
    while len(out) < n and sum(sizes) > 0:
        which = rng.choices(range(len(files)), sizes)[0]
        with open(files[which], "rb") as f:
            f.seek(rng.randrange(max(1, sizes[which] - piece)))
            out += f.read(piece)
    return out[:n]


def drop_cache(store):
    """The kernel forgets the pages of the store's files."""
    os.sync()
    for base, _, files in os.walk(store):
        for name in files:
            fd = os.open(os.path.join(base, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def kept(path, measure):
    """What `measure` gave, from the file `path` if it was measured before."""
    if not os.path.exists(path):
        with open(path + ".new", "w") as f:
            json.dump(measure(), f)
        os.rename(path + ".new", path)
    with open(path) as f:
        return json.load(f)


def train(command, directory, name, model, stages, corpus, *more):
    """Writes the plan and trains; `cairn train` itself goes on from its checkpoint, or finds nothing to do. Returns the
    path of plan and model without their endings, and the command's answer."""
    path = os.path.join(directory, name)
    with open(path + ".json", "w") as f:
        json.dump({"name": name, "model": model, "stages": stages}, f, indent=1)
    return path, cairn(command, "train", "-p", path + ".json", "-c", corpus, "-o", path + ".gguf", "--log", path + ".jsonl",
                       *more, progress=True)
