#!/usr/bin/env bash
# What a user of the installed library meets: installs a build into an empty prefix, builds examples/ against it through
# find_package and through pkg-config, shared and static, and runs all four on a context the installed command made.
#   tests/test_install.sh BUILD_DIR
set -uo pipefail
build=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
. tools/check.sh
cc=${CC:-cc}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
prefix=$tmp/prefix
quiet() { "$@" >"$tmp/log" 2>&1 || { cat "$tmp/log"; return 1; }; }

libdir() { dirname "$(find "$prefix" -name libcairn.a)"; }
installs() {
    local f
    quiet cmake --install "$build" --prefix "$prefix" || return 1
    lib=$(libdir)
    for f in "$prefix/bin/cairn" "$prefix/include/cairn/cairn.h" "$lib/libcairn.so.0" "$lib/pkgconfig/cairn.pc" \
        "$lib/cmake/cairn/cairnConfig.cmake"; do
        [ -e "$f" ] || { echo "no ${f#"$tmp/"}"; return 1; }
    done
}

# The names the library shows are those the headers declare: no more (FAISS, C++ templates, the rooms), no fewer.
shows_what_headers_declare() {
    nm -D --defined-only "$lib/libcairn.so" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' | sort >"$tmp/shown"
    cat "$prefix"/include/cairn/*.h | tr '\n' ' ' | sed 's/CAIRN_API/\n&/g' |
        sed -nE 's/^CAIRN_API [^;{(]*[ *](cairn_[a-z0-9_]+)\(.*/\1/p' | sort -u >"$tmp/declared"
    [ -s "$tmp/shown" ] && diff "$tmp/declared" "$tmp/shown" && return
    echo "< declared in include/cairn, > shown by libcairn.so"
    return 1
}
needs_no_faiss() { readelf -d "$lib/libcairn.so" >"$tmp/needs" && ! grep -E 'NEEDED.*faiss' "$tmp/needs"; }

with_cmake() {
    quiet cmake -S examples -B "$tmp/cmake" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release && quiet cmake --build "$tmp/cmake"
}
pc() { PKG_CONFIG_PATH=$lib/pkgconfig pkg-config "$@"; }
with_pkg_config() { # $1: shared or static
    local flags
    flags="$(pc --cflags cairn)" || return 1
    if [ "$1" = shared ]; then
        flags+=" examples/ask.c $(pc --libs cairn) -Wl,-rpath,$lib"
    else # the archive by name, then what cairn.pc says it needs
        flags+=" examples/ask.c $lib/libcairn.a $(pc --static --libs cairn | sed 's/-lcairn//')"
    fi
    mkdir -p "$tmp/pc" && quiet "$cc" -std=c11 -Wall -Wextra -Werror $flags -o "$tmp/pc/ask_$1"
}

# A text that stays as it is, with a sentence in its middle that no window at its end can see: one of this tree would put
# the sentence elsewhere in its block with every edit, and the model answers right in 98 of 100 places.
book=/usr/share/common-licenses/GPL-3
[ -f "$book" ] || book=docs/design.md
answer=40917
question='
What is the pass key? The pass key is '
ingests() {
    local half=$(($(stat -Lc %s "$book") / 2))
    { head -c $half "$book"; printf '\nThe pass key is %s. Remember it. %s is the pass key.\n' $answer $answer; tail -c +$((half + 1)) "$book"; } >"$tmp/text"
    quiet "$prefix/bin/cairn" ingest "$tmp/store" -m models/cairn-tiny-f16.gguf -c text "$tmp/text"
}
answers() {
    local said
    said=$("$1" models/cairn-tiny-f16.gguf "$tmp/store" text "$question" 2>&1) || { echo "$said"; return 1; }
    case $said in $answer*) ;; *) echo "said '$said', expected $answer"; return 1 ;; esac
}
stands_alone() { ldd "$1" >"$tmp/needs" && ! grep libcairn "$tmp/needs"; }

check "cmake --install puts command, headers, libraries, cairn.pc and the package in place" installs
lib=$(libdir) # check runs its command in a subshell
check "libcairn.so shows exactly the calls the public headers declare" shows_what_headers_declare
check "libcairn.so carries FAISS inside" needs_no_faiss
check "the examples build through find_package, shared and static" with_cmake
check "the example builds through pkg-config, shared" with_pkg_config shared
check "the example builds through pkg-config, static" with_pkg_config static
check "the static programs do without libcairn.so" stands_alone "$tmp/cmake/ask_static"
check "the engine example agrees with the reference" quiet "$tmp/cmake/engine"
check "the installed command ingests a text" ingests
for program in cmake/ask cmake/ask_static pc/ask_shared pc/ask_static; do
    check "$program finds the sentence in the middle of the text" answers "$tmp/$program"
done
exit $((checks_failed > 0))
