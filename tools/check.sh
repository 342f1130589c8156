# Sourced by the scripts that check something: one line per check, in words, which tools/test.sh counts.

checks_failed=0

# check SENTENCE COMMAND...: "ok - SENTENCE", or "not ok - SENTENCE" and below it, indented, what the command said.
check() {
    local sentence=$1 said
    shift
    if said=$("$@" 2>&1); then
        printf 'ok - %s\n' "$sentence"
    else
        checks_failed=$((checks_failed + 1))
        printf 'not ok - %s\n' "$sentence"
        printf '%s\n' "$said" | sed -n '1,60s/^/    /p'
    fi
}

# skip SENTENCE REASON: counted as neither.
skip() { printf 'skipped - %s (%s)\n' "$1" "$2"; }
