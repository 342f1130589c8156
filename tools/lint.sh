#!/usr/bin/env bash
# clang-format over the tracked sources and, with --tidy, clang-tidy, which reads how they are compiled from a build
# directory and takes minutes.
#   tools/lint.sh [--tidy] [BUILD_DIR]        default: build
set -uo pipefail
cd "$(dirname "$0")/.."
. tools/check.sh
tidy=
if [ "${1-}" = --tidy ]; then tidy=yes && shift; fi
build=${1:-build}

sources() { git ls-files -- "$@" 2>/dev/null | grep . || find "$@" -type f; }
formatted() {
    local said
    said=$(sources include src store index tools bench tests examples | grep -E '\.(c|h|cpp)$' | xargs clang-format --dry-run -Werror 2>&1)
    ! grep 'error:' <<<"$said"
}
# Tests are left to the compilers and sanitizers: cmocka's macros hide their ends from the analyzer.
tidy_findings() {
    sources src store index tools bench | grep '\.c$' |
        while read -r f; do ! grep -qF "/$f\"" "$build/compile_commands.json" || echo "$f"; done |
        xargs -P "$(nproc)" -n 1 clang-tidy -p "$build" --quiet 2>/dev/null | grep -E ': (error|warning): ' | sort -u
}

if command -v clang-format >/dev/null; then
    check "clang-format would change nothing" formatted
else
    skip "clang-format would change nothing" "clang-format is not installed"
fi
if [ -z "$tidy" ]; then
    exit $((checks_failed > 0))
elif ! command -v clang-tidy >/dev/null; then
    skip "clang-tidy finds nothing" "clang-tidy is not installed"
elif [ ! -f "$build/compile_commands.json" ]; then
    skip "clang-tidy finds nothing" "no $build/compile_commands.json: build first"
else
    # Findings are shown and counted as a check that was left out: those that are here are still to be looked into.
    findings=$(tidy_findings)
    if [ -z "$findings" ]; then
        echo "ok - clang-tidy finds nothing"
    else
        sed 's/^/    /' <<<"$findings"
        skip "clang-tidy finds nothing" "$(wc -l <<<"$findings") findings, above"
    fi
fi
exit $((checks_failed > 0))
