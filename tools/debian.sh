# Sourced by text.sh and corpus.sh: text out of Debian packages that are downloaded and read, not installed.
export LC_ALL=C
cache=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache
say() { echo "$(basename "$0" .sh): $*" >&2; }

# Printable bytes, tabs and newlines; no blanks before a newline; no two empty lines in a row.
clean() { tr -cd '\11\12\40-\176\200-\377' | sed 's/[ \t]*$//' | cat -s; }

# fetch PACKAGE DIR: the package file lands in DIR. apt needs to know its archive, so a machine without package lists
# gets them first.
fetch() {
    command -v apt-get >/dev/null || return 1
    (cd "$2" && apt-get -qq download "$1" 2>/dev/null) && return
    local root=
    [ "$(id -u)" = 0 ] || root=sudo
    say "asking Debian's archive for its list of packages"
    $root apt-get -qq -o DPkg::Lock::Timeout=300 update >&2 || true
    (cd "$2" && apt-get -qq download "$1" 2>/dev/null)
}
