#!/usr/bin/env bash
# What README.md shows is what there is: its C is a piece of an example that test_install.sh compiles and runs, its
# commands exist, the files it names are there.
#   tests/test_readme.sh BUILD_DIR
set -uo pipefail
cairn=$(cd "$1" && pwd)/cairn
cd "$(dirname "$0")/.."
. tools/check.sh

code_is_of_an_example() {
    awk 'FNR == 1 { file++ }
        file < ARGC - 1 { examples = examples $0 "\n"; next }
        /^```c$/        { code = 1; block = ""; next }
        /^```/ && code  { code = 0; blocks++; if (!index(examples, block)) { print "not in examples/:\n" block; bad = 1 } }
        code            { block = block $0 "\n" }
        END { if (!blocks) print "no C in README.md"; exit bad || !blocks }' examples/*.c README.md
}
commands_exist() {
    local words bad=0
    while read -r words; do
        # shellcheck disable=SC2086
        "$cairn" $words --help >/dev/null 2>&1 || { echo "no such command: cairn $words"; bad=1; }
    done < <(sed -nE 's/^[$] (build\/)?cairn (bench [a-z]+|[a-z]+).*/\2/p' README.md docs/*.md | sort -u)
    return $bad
}
options_exist() {
    local line command option bad=0
    while read -r line; do
        command=$(sed -E 's/^[$] (build\/)?cairn (bench [a-z]+|[a-z]+).*/\2/' <<<"$line")
        for option in $(grep -oE ' --[a-z-]+' <<<"${line%%\"*}"); do
            "$cairn" $command --help | grep -q -- "$option" || { echo "cairn $command has no $option"; bad=1; }
        done
    done < <(grep -E '^[$] (build/)?cairn [a-z]+' README.md docs/*.md -h)
    return $bad
}
files_exist() {
    local f bad=0
    for f in $(grep -oE '\]\([A-Za-z0-9_./-]+\)' README.md | tr -d '()]') $(grep -oE '\b(tools|docs|examples|tests|models|include|cmake)/[A-Za-z0-9_./-]+[A-Za-z0-9]' README.md); do
        [ -e "$f" ] || { echo "README.md names $f, which is not there"; bad=1; }
    done
    return $bad
}

check "the C in README.md is a piece of examples/" code_is_of_an_example
check "the commands README.md and docs/ show exist" commands_exist
check "the options they show exist" options_exist
check "the files README.md names are there" files_exist
exit $((checks_failed > 0))
