#!/usr/bin/env bash
# Everything that is checked, in one command: installs what is missing from Debian, builds, runs. Its last line is
# "N passed, N failed"; the exit status is 0 only if nothing failed.
#   tools/test.sh            all of it (about ten minutes on two cores)
#   tools/test.sh --quick    without the sanitizer builds
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

quick=
case "${1-}" in
--quick) quick=yes ;;
"") ;;
*) sed -n '2,5s/^# //p' "$0" >&2 && exit 2 ;;
esac

jobs=$(env -u OMP_NUM_THREADS nproc) # which would believe OMP_NUM_THREADS
export CTEST_OUTPUT_ON_FAILURE=1 OMP_NUM_THREADS=1
runner= label= # what tests are started with; which ones are built, all if empty
began=$SECONDS passed=0 failed=0 skipped=0 failures=

say() { printf '\n== %s (after %d s)\n' "$*" $((SECONDS - began)); }
count() { # passed failed skipped
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
}
broken() { count 0 1 0 && failures+="  $*"$'\n'; }

# script COMMAND...: a script that prints "ok - ...", "not ok - ..." and "skipped - ..." lines.
script() {
    local log ok bad not
    log=$(mktemp)
    "$@" 2>&1 | tee "$log"
    local status=${PIPESTATUS[0]}
    ok=$(grep -c '^ok - ' "$log") bad=$(grep -c '^not ok - ' "$log") not=$(grep -c '^skipped - ' "$log")
    [ "$bad" = 0 ] || failures+=$(sed -n 's/^not ok - /  /p' "$log")$'\n'
    rm -f "$log"
    count "$ok" "$bad" "$not"
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then broken "$* ended with status $status"; fi
}

# build DIR OPTIONS...: configures and builds; a failure shows its last lines and counts as one. Warnings are errors in
# the release build alone: what a sanitizer adds to the code makes the compiler suspect what is not there.
build() {
    local dir=$1 log targets=all
    shift
    log=$(mktemp)
    # shellcheck disable=SC2086  # a list of targets
    if cmake -S . -B "$dir" -DCAIRN_TESTS=ON "$@" >"$log" 2>&1 &&
        { [ -z "$label" ] || targets=$(ctest --test-dir "$dir" -N -L "$label" | sed -n 's/^ *Test *#[0-9]*: //p'); } &&
        cmake --build "$dir" -j "$jobs" --target $targets >>"$log" 2>&1; then
        rm -f "$log" && count 1 0 0 && return
    fi
    grep -E ' error: |warning: |undefined reference|CMake Error' "$log" | head -40
    tail -n 20 "$log"
    rm -f "$log"
    broken "$dir does not build"
    return 1
}

# tests DIR WHAT OPTIONS...: runs ctest, a program on each core (none judges a time), and counts single tests, not
# programs: cmocka names each in the log. A program that dies, times out or is no cmocka program counts as one.
tests() {
    local dir=$1 what=$2 status n log=$1/Testing/Temporary/LastTest.log
    shift 2
    mkdir -p "${log%/*}" && : >"$log"
    # shellcheck disable=SC2086  # the runner is empty or two words
    $runner ctest --test-dir "$dir" -j "$jobs" "$@" | grep -vE '^(Internal ctest|Test project|Total Test time|Label Time|[a-z]+ +=|\(.*\)| *Start)|^$'
    status=${PIPESTATUS[0]}
    n=$(awk '
        / Testing: /        { name = $NF; ok = bad = not = running = 0 }
        /^\[ RUN      \]/   { running = 1 }
        /^\[       OK \]/   { ok++; running = 0 }
        /^\[  SKIPPED \]/   { if (running) not++; running = 0 }
        /^\[  FAILED  \]/   { if (running) { bad++; print "  " name ": " $NF > "/dev/stderr" } running = 0 }
        /^Test Passed\./    { passed += ok + not > 0 ? ok : 1; skipped += not }
        /^Test (Failed|timed out|.*[Ee]xception|not run)/ {
            if (bad == 0) { bad = 1; print "  " name > "/dev/stderr" }
            passed += ok; failed += bad; skipped += not
        }
        END { print passed + 0, failed + 0, skipped + 0 }' "$log" 2>"$dir/failures")
    # shellcheck disable=SC2086  # three numbers
    count $n
    if [ -s "$dir/failures" ]; then
        failures+=$(sed "s/\$/ ($what)/" "$dir/failures")$'\n'
    elif [ "$status" != 0 ]; then
        broken "ctest in $dir ended with status $status"
    fi
}

# The thread sanitizer of GCC 12 cannot place its memory where the kernel randomises addresses widely.
thread_sanitizer_runner() {
    local tmp
    tmp=$(mktemp -d)
    echo 'int main(void) { return 0; }' >"$tmp/a.c"
    cc -fsanitize=thread "$tmp/a.c" -o "$tmp/a" 2>/dev/null || { rm -rf "$tmp" && return 1; }
    for i in 1 2 3 4 5 6 7 8; do "$tmp/a" >/dev/null 2>&1 || { setarch -R "$tmp/a" >/dev/null 2>&1 && echo "setarch -R" || return 1; break; }; done
    rm -rf "$tmp"
}

say "packages"
tools/deps.sh build test lint || exit 1

say "rooms and headers"
script tools/arrows.sh

say "Release build"
if build build -DCMAKE_BUILD_TYPE=Release -DCAIRN_WERROR=ON; then
    say "all tests"
    tests build Release
    say "the installed library"
    script tests/test_install.sh build
    [ ! -e tests/test_readme.sh ] || script tests/test_readme.sh build
    say "format"
    script tools/lint.sh build
fi

if [ -z "$quick" ]; then
    export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
    say "address and undefined sanitizers: build"
    if build build-asan -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS="-O1 -g1" -DCMAKE_CXX_FLAGS="-O1 -g1" -DCAIRN_SANITIZE=address; then
        say "address and undefined sanitizers: tests"
        # Where OpenBLAS does not know the processor our own products, instrumented, would take half as long again; tests
        # that are about them ask for them.
        if grep -qw avx2 /proc/cpuinfo; then
            OPENBLAS_CORETYPE=${OPENBLAS_CORETYPE-Haswell} tests build-asan ASan+UBSan -LE slow
        else
            tests build-asan ASan+UBSan -LE slow
        fi
    fi
    say "thread sanitizer: build and tests that use threads"
    if ! runner=$(thread_sanitizer_runner); then
        echo "skipped: programs under the thread sanitizer do not start on this machine"
        count 0 0 1
    elif label=threads build build-tsan -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS="-O1 -g1" -DCMAKE_CXX_FLAGS="-O1 -g1" -DCAIRN_SANITIZE=thread; then
        export TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp:halt_on_error=1
        tests build-tsan TSan -L threads
    fi
fi

say "done"
[ -z "$failures" ] || printf 'failed:\n%s' "$failures" | grep .
printf '%d passed, %d failed' "$passed" "$failed"
[ "$skipped" = 0 ] || printf ', %d skipped' "$skipped"
echo
[ "$failed" = 0 ]
