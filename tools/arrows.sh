#!/usr/bin/env bash
# The house rules that a compiler does not see (docs/design.md): which room may include which, one door for each third
# party, and headers that stand alone. Reads the sources only; needs no build.
set -uo pipefail
cd "$(dirname "$0")/.."
. tools/check.sh

# The tracked files, or in an unpacked archive all of them.
sources() { git ls-files --cached --others --exclude-standard 2>/dev/null || find . -path './build*' -prune -o -type f -print | sed 's|^\./||'; }
files=$(sources | grep -E '\.(c|h|cpp)$' | sort)

# All includes as "file kind header", kind q for "x.h" and a for <x.h>.
includes=$(for f in $files; do
    [ ! -f "$f" ] || sed -nE "s|^[ \t]*#[ \t]*include[ \t]*\"([^\"]+)\".*|$f q \1|p; s|^[ \t]*#[ \t]*include[ \t]*<([^>]+)>.*|$f a \1|p" "$f"
done)

rooms_look_down() {
    awk -v files="$(printf '%s ' $files)" '
        function room(path) {
            if (path ~ /^include\/cairn\//) { sub(/.*\//, "", path); sub(/\.h$/, "", path); return path == "cairn" ? "all" : path }
            if (path ~ /^src\//) { split(path, part, "/"); return part[2] }
            split(path, part, "/"); return part[1]
        }
        BEGIN {
            below["base"] = ""
            below["kernels"] = "base"
            below["store"] = below["index"] = "base kernels"
            below["attention"] = "base kernels store index"
            below["context"] = below["attention"] " attention"
            below["model"] = below["context"] " context"
            below["train"] = below["model"] " model"
            below["all"] = below["train"] " train"
            public_only["tools"] = public_only["bench"] = public_only["examples"] = 1
            n = split(files, list, " ")
            for (i = 1; i <= n; i++) if (list[i] ~ /\.h$/ && list[i] !~ /^include\//) {
                base = list[i]; sub(/.*\//, "", base)
                where[base] = base in where ? where[base] " " room(list[i]) : room(list[i])
            }
        }
        function may(from, to) { return from == to || from == "tests" || index(" " below[from] " ", " " to " ") > 0 }
        {
            from = room($1)
            if ($3 ~ /^cairn\//) {
                if (!(from in public_only) && !may(from, room("include/" $3))) { print $1 " includes <" $3 ">: " from " does not stand above it"; bad = 1 }
                next
            }
            base = $3; sub(/.*\//, "", base)
            if (!(base in where)) next
            n = split(where[base], homes, " "); good = 0
            for (i = 1; i <= n; i++)
                if (from in public_only ? homes[i] == from || homes[i] == "tools" && from == "bench" : may(from, homes[i])) good = 1
            if (!good) { print $1 " includes " $3 " of " where[base] ": " from " may not"; bad = 1 }
        }
        END { exit bad }' <<<"$includes"
}

# only_in PLACE MAX HEADER: files that include HEADER all match PLACE and are at most MAX.
only_in() {
    local users stray
    users=$(awk -v h="$3" '$3 ~ "^" h { print $1 }' <<<"$includes" | sort -u)
    stray=$(grep -vE "$1" <<<"$users" | grep .) && { echo "$3 is included by $stray"; return 1; }
    [ "$(grep -c . <<<"$users")" -le "$2" ] || { echo "$3 has more than $2 doors:" $users; return 1; }
}

faiss_has_one_c_door() {
    # bench/peers is not ours: a peer takes FAISS as anyone would
    only_in '^(index/|tests/test_faiss_shim\.c$|bench/peers/)' 4 'faiss/' || return 1
    local c
    c=$(awk '$3 ~ "^faiss/" && $1 ~ /\.(c|h)$/ && $3 !~ "^faiss/c_api/"' <<<"$includes")
    [ -z "$c" ] || { echo "C code may include <faiss/c_api/...> only: $c"; return 1; }
    [ "$(awk '$3 ~ "^faiss/" && $1 ~ /^index\/.*\.(c|h)$/ { print $1 }' <<<"$includes" | sort -u | wc -l)" -le 1 ] || { echo "FAISS has more than one C door"; return 1; }
}

# alone COMPILER... : every header given on stdin compiles as the first line of a file.
alone() {
    local header bad=0
    while read -r header; do
        echo "#include \"$header\"" | "$@" -fsyntax-only -Iinclude - || bad=1
    done
    return $bad
}
public() { grep '^include/cairn/.*\.h$' <<<"$files"; }
c11() { public | alone "${CC:-cc}" -x c -std=c11 -pedantic-errors -Wall -Wextra -Wstrict-prototypes -Werror; }
cxx() { public | alone "${CXX:-c++}" -x c++ -std=c++11 -pedantic-errors -Wall -Wextra -Werror; }
inner() { # but for bodies, which are text over one vector type or another, or over float and double
    grep -E '^(src|store|index)/.*\.h$' <<<"$files" | grep -vE '^src/(kernels|train)/(body_|vec)[a-z0-9_]*\.h$' |
        alone "${CC:-cc}" -x c -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror $(printf ' -I%s' src/*/ store index)
}
files_fit() { local long; long=$(printf '%s\n' $files | xargs wc -l | awk '$2 != "total" && $1 > 850'); [ -z "$long" ] || { echo "above 850 lines: $long"; return 1; }; }

check "a room includes only rooms below it; tools, bench and examples public headers only" rooms_look_down
# The test of the format holds the bytes on disk against docs/format.md without our own code in between.
check "lmdb.h is included in store/ only, and in the test of the format" only_in '^(store/|tests/test_store_format\.c$)' 9 'lmdb\.h'
check "FAISS is included in one C file of index/, through its C API, in the shim and in peers" faiss_has_one_c_door
check "cblas.h is included in one kernel file" only_in '^src/kernels/' 1 'cblas'
check "xxhash.h is included in one file of base, in the command, and in the test of the format" only_in '^(src/base/hash\.c|tools/.*|tests/test_store_format\.c)$' 9 'xxhash'
check "pcre2.h is included in one file of src/model" only_in '^src/model/' 1 'pcre2'
check "liburing.h is included in one file of store/" only_in '^store/' 1 'liburing'
check "public headers compile alone as C11" c11
check "public headers compile alone as C++11" cxx
check "internal headers compile alone" inner
check "no file is above 850 lines" files_fit
exit $((checks_failed > 0))
