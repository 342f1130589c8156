#!/usr/bin/env bash
# Writes BYTES bytes of real English text to stdout, always the same ones: first The Jargon File (1.7 MB, a book),
# then the GNU Collaborative International Dictionary of English (38 MB, Webster 1913 and later). The demo model never
# saw either. Both come out of Debian packages, which are downloaded and read but not installed.
#   tools/text.sh BYTES [SKIP] > book.txt       SKIP bytes of the text are left out first
set -euo pipefail
. "$(dirname "$0")/debian.sh"

[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
bytes=$1 skip=${2:-0}
case $bytes$skip in *[!0-9]*) echo "text: '$*' should be numbers of bytes" >&2; exit 2 ;; esac
cache=$cache/text

# book PACKAGE FILE: the cleaned text of one package, made once, as $cache/PACKAGE.txt.
book() {
    local out=$cache/$1.txt
    [ -s "$out" ] && return
    mkdir -p "$cache"
    if [ -s "/$2" ]; then
        zcat <"/$2" | clean >"$out.$$"
    else
        say "downloading $1 from Debian"
        fetch "$1" "$cache" || return 1
        dpkg-deb --fsys-tarfile "$cache/$1"_*.deb | tar -xO "./$2" | zcat | clean >"$out.$$" || return 1
        rm -f "$cache/$1"_*.deb
    fi
    mv "$out.$$" "$out"
}

# Without Debian's archive: what any Debian machine with a compiler has, mostly perl and its manual in the source.
local_text() {
    local out=$cache/local.txt
    [ -s "$out" ] && return
    mkdir -p "$cache"
    find /usr/share/common-licenses /usr/share/perl /usr/share/perl5 /usr/lib/python3* /usr/share/cmake* -type f \
        \( -path '*/common-licenses/*' -o -name '*.p[ml]' -o -name '*.pod' -o -name '*.py' -o -name '*.rst' -o -name '*.txt' \) \
        2>/dev/null | sort | tr '\n' '\0' | xargs -0 cat 2>/dev/null | clean >"$out.$$" || true
    mv "$out.$$" "$out"
}

need=$((bytes + skip)) have=0 files=()
add() { files+=("$cache/$1.txt") && have=$((have + $(stat -c %s "$cache/$1.txt"))); }
if book jargon-text usr/share/doc/jargon-text/jargon.txt.gz; then
    add jargon-text
    if [ $have -lt $need ] && book dict-gcide usr/share/dictd/gcide.dict.dz; then add dict-gcide; fi
fi
if [ $have -lt $need ]; then
    say "no more text from Debian's archive ($have of $need bytes): adding program sources and licences of this machine"
    local_text && add local
fi
[ $have -ge $need ] || { say "only $have bytes of text are to be had here, $need were asked for"; exit 1; }
# Not a pipe into head: the end of the pipe would stop cat with a signal.
tail -q -c "+$((skip + 1))" <(cat "${files[@]}" 2>/dev/null) | { head -c "$bytes"; cat >/dev/null; }
