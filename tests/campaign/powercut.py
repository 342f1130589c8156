"""What a disk may hold after a power cut: a log of calls (fault.c) replayed into a directory.

The model is POSIX at its weakest, with two things every journaling file system gives: a directory's names come back in
the order they were changed, up to some point, and a write is torn at sectors of 512 bytes.
  - a file's bytes and length are safe once fsync or fdatasync of it returned; a write through O_DSYNC or O_SYNC is safe
    itself when it returns, and nothing else is
  - a name (created, renamed, removed) is safe once fsync of its directory returned
  - all else is there, gone or torn, each write by itself: later ones may be there and earlier ones not
What a file holds says nothing about its name, and the other way round: a renamed file can be empty.
The lock file is written through a map, so no log has its bytes: it is random then, or zeros, or as it was.
"""
import os

SECTOR = 512
DURABLE = 0o10000 | 0o4000000  # O_DSYNC, O_SYNC
TRUNCATE = 0o1000


class Call:
    def __init__(self, kind, flags, offset, size, path, second, data):
        self.kind, self.flags, self.offset, self.size = kind, flags, offset, size
        self.path, self.second, self.data = path, second, data

    def __str__(self):
        if self.kind == "W":
            return f"write of {self.size} bytes at {self.offset} of {self.path}"
        return {"S": "sync"}.get(self.kind, "") + f"{self.second} {self.path}".strip()


def read_log(path, where):
    """The calls of a log; paths are relative to `where`."""
    with open(path) as f:
        lines = f.read().splitlines()
    data = b""
    if os.path.exists(path + ".data"):
        with open(path + ".data", "rb") as f:
            data = f.read()
    calls, at = [], 0
    for line in lines:
        kind, flags, offset, size, name, second = line.split("\t")
        flags, offset, size = int(flags), int(offset), int(size)
        written = b""
        if kind == "W":
            written = data[at:at + size]
            at += size
        if second.startswith("rename "):
            second = "rename " + os.path.relpath(second[7:], where)
        calls.append(Call(kind, flags, offset, size, os.path.relpath(name, where), second, written))
    assert at == len(data), "the log and its data differ in length"
    return calls


class File:
    def __init__(self, data=b""):
        self.safe = bytes(data)
        self.since = []  # (offset, bytes or None, length or None, safe by itself)

    def sync(self):
        self.safe, self.since = self.bytes(None), []

    def bytes(self, choose):
        out = bytearray(self.safe)
        for offset, data, length, safe in self.since:
            keep = True if safe or choose is None else choose(data)
            if keep is False:
                continue
            if data is None:
                if length < len(out):
                    del out[length:]
                else:
                    out.extend(bytes(length - len(out)))
                continue
            for a, b in [(0, len(data))] if keep is True else keep:
                if len(out) < offset + b:
                    out.extend(bytes(offset + b - len(out)))
                out[offset + a:offset + b] = data[a:b]
        return bytes(out)


class Directory:
    def __init__(self):
        self.safe, self.now, self.since = {}, {}, []

    def change(self, **names):
        self.since.append(names)
        self.apply(self.now, names)

    @staticmethod
    def apply(to, names):
        for name, node in names.items():
            if node is None:
                to.pop(name, None)
            else:
                to[name] = node

    def sync(self):
        self.safe, self.since = dict(self.now), []


def load(path):
    d = Directory()
    for name in os.listdir(path):
        full = os.path.join(path, name)
        if os.path.isdir(full):
            d.now[name] = load(full)
        else:
            with open(full, "rb") as f:
                d.now[name] = File(f.read())
    d.sync()
    return d


def find(tree, path):
    node = tree
    for part in path.split("/"):
        if part != ".":
            node = node.now.get(part) if isinstance(node, Directory) else None
        if node is None:
            return None
    return node


def apply(tree, call, safe):
    """`safe`: the call returned."""
    where, name = os.path.split(call.path)
    parent, node = find(tree, where or "."), find(tree, call.path)
    if call.kind == "W" and node is not None:
        node.since.append((call.offset, call.data, None, safe and bool(call.flags & DURABLE)))
    elif call.kind == "S" and node is not None and safe:
        node.sync()
    elif call.kind == "T" and node is not None:
        if call.second == "ftruncate":
            node.since.append((0, None, call.offset, False))
        elif call.flags == 0 and len(node.bytes(None)) < call.offset + call.size:
            node.since.append((0, None, call.offset + call.size, False))
    elif call.kind == "N" and parent is not None:
        if call.second == "create" and node is None:
            parent.change(**{name: File()})
        elif call.second in ("create", "open") and call.flags & TRUNCATE and node is not None:
            node.since.append((0, None, 0, False))
        elif call.second == "mkdir" and node is None:
            parent.change(**{name: Directory()})
        elif call.second == "unlink" and node is not None or call.second == "rmdir" and node is not None and not node.now:
            parent.change(**{name: None})
        elif call.second.startswith("rename ") and node is not None:
            to = call.second[7:]
            assert os.path.dirname(to) == where, "a rename between directories: not known here"
            parent.change(**{name: None, os.path.basename(to): node})


def store_tree(node, path, r, mode, lost):
    def choose(data):
        if mode == "all":
            return True
        if mode == "none":
            lost[0] += 1
            return False
        luck = r.random()
        if luck < 0.4:
            return True
        lost[0] += 1
        if luck < 0.7 or data is None:
            return False
        cuts = range(0, len(data), SECTOR)
        return [(a, min(a + SECTOR, len(data))) for a in cuts if r.random() < 0.5]

    os.makedirs(path, exist_ok=True)
    names = dict(node.safe)
    if r is None or mode == "all":
        kept = len(node.since)
    else:
        kept = 0 if mode == "none" else r.randint(0, len(node.since))
    for change in node.since[:kept]:
        Directory.apply(names, change)
    lost[0] += len(node.since) - kept
    for name, child in names.items():
        full = os.path.join(path, name)
        if isinstance(child, Directory):
            store_tree(child, full, r, mode, lost)
            continue
        data = child.bytes(choose if r is not None else None)
        if name == "lock.mdb" and r is not None and len(data) > 0:
            data = r.choice((data, bytes(len(data)), r.randbytes(len(data))))
        with open(full, "wb") as f:
            f.write(data)
        os.chmod(full, 0o600)


def replay(calls, where, r, torn=None):
    """Makes `where` what it would be after `calls` and a power cut that interrupted the call `torn`. r None: no power cut,
    all of it is there. Returns how many writes and names were lost."""
    tree = load(where)
    for call in calls:
        apply(tree, call, True)
    if torn is not None:
        apply(tree, torn, False)
    for name in os.listdir(where):
        remove(os.path.join(where, name))
    lost = [0]
    mode = "all" if r is None else r.choice(("none", "all", "some", "some", "some"))
    store_tree(tree, where, r, mode, lost)
    return lost[0]


def remove(path):
    if os.path.isdir(path):
        for name in os.listdir(path):
            remove(os.path.join(path, name))
        os.rmdir(path)
    else:
        os.unlink(path)
